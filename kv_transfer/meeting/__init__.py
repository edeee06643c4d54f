"""How two nodes meet, measure and choose.

peers          whom a reader has met
meeting        one meeting: link_probe measures over scratch blocks, link_choice decides, local_limits knows what would be
               possible
pushers        the readers that an owner knows, and its links into their memory
scratch        the blocks that probes move
link_report    GET /kv/links
"""

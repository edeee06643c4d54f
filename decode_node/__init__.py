"""The decode node: takes over computed prompts and decodes them to their end; computes prompts itself where asked to.

main       the process: from configuration to exit
service    requests and engine events, turned into token messages
handoff    one import per request: reserved blocks are filled, verified and activated, or given back
"""

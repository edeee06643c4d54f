"""How fast a store moves blocks here, beside what the machine does without it.

contest     contestants in turn, again and again, so that noise hits all alike; what came of it
slot_memory what is copied to and from
moves       between a device's blocks and host slots, and between slots and disk
"""

"""Plain sockets.

transport     the seam's end: reads on worker threads
server        the owner's end: sends from its arena to who holds a valid ticket
wire          what the two say
"""

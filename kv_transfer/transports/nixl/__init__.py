"""NIXL: one-sided reads and writes over UCX.

transport     the seam's end
agent         the active agent and the one thread that calls it; mailbox is how it is asked, transfer what it is asked for
passive       the agent that peers know
blocks        an arena as descriptors
library       finds the library, and works around what it does
"""

"""UCX by way of ucxx, in a helper process: what UCX cannot cancel, the end of a process does.

transport     the seam's end
helper        holds the process, and replaces one that died
process       what runs in it: worker is its UCX worker, reader and owner the two roles
wire          what node and helper, and two helpers, say to each other
library       finds ucxx
"""

"""One context on its way from its owner to its reader.

exports          the owner's side: leases on blocks that others may read
export           one of them; export_stream is what its reader hears, ticket_issuer makes the tickets
push             an owner's writes into a reader's blocks
imports          the reader's side: fetches contexts and tidies up after each
fetch            one hand-off as its reader lives it; landing is its state, without I/O, prefix how far it has come
leases           the reader's side of every lease
link_queue       whose blocks move next over one link, and how many at once
presence         whether an owner that pushes still lives
quarantine       blocks that bytes may still land in, or be read from
timeline         where the time of a hand-off went
"""

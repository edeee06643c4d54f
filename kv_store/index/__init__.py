"""The index in Redis: places of chunks, never bytes.

index              RedisIndex, what a process has of it: publishes, finds
follower           follows what owners publish, for people and checks
settings           where the server is
state              what the index tells about itself
embedded           a server of our own, where the user names none (embedded_child: the process that becomes it)
members            owners, and members: owners that are alive
keys, places       the data model: names of keys, packed entries
seal               which owners are our cluster's own
events             what an owner's stream says
scripts            Lua: every write, fenced; every read that could be large, capped
server             commands to replies: standalone, cluster, TLS
reader, lookup     the entries of a chain, and who holds most of it
flight             a round trip, and who makes it late
breaker            whether the server is worth asking
news, chunk_book   what the store has said, and which chunks are held in full
publisher          keeps an owner's entries as its store is
membership         who is alive
sweeper, drift     takes out dead owners; compares and mends
keeper             the task that does all of the writing
"""

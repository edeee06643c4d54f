"""The disk tier: KV blocks in files that outlive the process.

    <disk_path>/lock                        one process a folder
    <disk_path>/<layout fingerprint>/       one folder a layout: two never mix
        000000000000002a.blocks             a segment: a header, then up to 256 blocks
        000000000000002b.writing            one that is not finished; the next start deletes it

segment         a segment's header, byte by byte; nothing in it is believed before it is checked
segment_files   one layout's segments as files: written, renamed, read, deleted
folder          the folder: its lock, the sub-folders of layouts, what is left of layouts that nobody serves any more
books           which block is where; no file is touched
eviction        which file goes first
io_choice       O_DIRECT or the page cache, by a short measurement
scan            what a start finds, and what it deletes
keeper          makes, changes and deletes segments, within the tier's size
write_pause     when to write again after the disk refused
stats           what the tier tells of itself
tier            DiskTier, which puts them together
"""

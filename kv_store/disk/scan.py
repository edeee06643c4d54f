"""What a start finds in a layout's folder: whole segments are kept, everything else with our names is deleted."""

import logging
import time

from kv_store.disk.books import DiskBooks
from kv_store.disk.segment import Segment
from kv_store.disk.segment_files import SegmentFiles, is_out_of_files, is_unfinished
from kv_store.disk.stats import DiskScan
from protocol.errors import MalformedMessage

log = logging.getLogger(__name__)


def scan(files: SegmentFiles, books: DiskBooks, now: float) -> DiskScan:
    """Fills the books from the headers alone; blocks are verified when they are read. Of a block that two segments have, the
    one that was written last counts. Raises OSError where the folder cannot be read."""
    start = time.perf_counter()
    wall_now = time.time()
    segments: list[Segment] = []
    num_refused = num_unfinished = 0
    for name in files.names():
        if is_unfinished(name):
            num_unfinished += _delete(files, name)
            continue
        try:
            segments.append(files.load(name, now, wall_now))
        except MalformedMessage as error:
            log.warning("deleting %s from the disk tier: %s", name, error.message)
            num_refused += _delete(files, name)
        except OSError as error:
            if is_out_of_files(error):
                raise
            log.warning("deleting %s from the disk tier: %s", name, error.strerror)
            num_refused += _delete(files, name)
    for segment in sorted(segments, key=lambda segment: segment.number, reverse=True):
        books.add(segment)
    return DiskScan(
        num_files=len(segments),
        num_blocks=books.num_blocks,
        num_refused=num_refused,
        num_unfinished=num_unfinished,
        seconds=time.perf_counter() - start,
    )


def _delete(files: SegmentFiles, name: str) -> int:
    """1: it counts, deleted or not."""
    try:
        files.delete_name(name)
    except OSError as error:
        log.warning("%s stays in the disk tier's folder: %s", name, error.strerror)
    return 1

"""The mailbox: calls come out in order, and a wait always ends."""

import threading
import time

from kv_transfer.transports.nixl.mailbox import Mailbox


def test_calls_come_out_in_order_and_once() -> None:
    mailbox = Mailbox()
    seen: list[int] = []
    for number in range(5):
        mailbox.put(lambda number=number: seen.append(number))  # type: ignore[misc]
    for call in mailbox.take(None):
        call()
    assert seen == [0, 1, 2, 3, 4]
    assert mailbox.take(0) == []


def test_a_wait_ends_with_a_call_from_another_thread() -> None:
    mailbox = Mailbox()
    seen = threading.Event()
    caller = threading.Thread(target=lambda: mailbox.put(seen.set))
    caller.start()
    calls: list[object] = []
    while not calls:
        for call in mailbox.take(None):
            call()
            calls.append(call)
    caller.join()
    assert seen.is_set()


def test_short_waits_end_however_puts_and_takes_interleave() -> None:
    mailbox = Mailbox()
    num_calls = 3000
    taken = 0

    def put_all() -> None:
        for _ in range(num_calls):
            mailbox.put(lambda: None)
            time.sleep(0)

    caller = threading.Thread(target=put_all)
    caller.start()
    while taken < num_calls:
        taken += len(mailbox.take(1e-6))
    caller.join()
    assert mailbox.take(1e-6) == []

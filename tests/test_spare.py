"""A packet that is decided and that nobody has kept serves for the next message: none can tell."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict
from support import RECEIVE_BUFFER, TIMEOUT, in_thread, run_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import UdpFlow

USES: dict[str, Callable[[Packet], object]] = {
    "nothing": lambda packet: None,
    "mark": lambda packet: packet.set_mark(7),
    "payload": lambda packet: packet.set_payload(bytes(packet)[:-1] + b"!"),
    "retain": Packet.retain,
    "bytes": bytes,
    "view": memoryview,
    "priority": lambda packet: packet.set_priority(7),
    "rare attribute": lambda packet: packet.conntrack,
}

HOLDS: dict[str, Callable[[Packet], Any]] = {
    "itself": lambda packet: lambda: packet,
    "method": lambda packet: lambda held=packet.accept: held.__self__,
    "generator": lambda packet: (packet for _ in range(2)).__next__,
}


def serve(
    queue: NetfilterQueue,
    queue_num: int,
    flow: UdpFlow,
    callback: Callable[[Packet], None],
    between: Callable[[], None] = lambda: None,
) -> None:
    """Send b"1" and b"2", and run the queue after each, so that it comes with a read of its own.
    What the callback leaves undecided is accepted."""
    accepted: list[int] = []

    def accept(packet: Packet) -> None:
        callback(packet)
        if packet.verdict is None:
            packet.accept()
            accepted.append(packet.id)

    queue.bind(queue_num, accept, sock_len=RECEIVE_BUFFER)
    flow.send(b"1")
    run_until(queue, lambda: len(accepted) == 1)
    between()
    flow.send(b"2")
    run_until(queue, lambda: len(accepted) == 2)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nothing_is_left_of_the_one_before(
    use: Callable[[Packet], object],
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
) -> None:
    seen = []

    def callback(packet: Packet) -> None:
        whole = packet.get_payload()
        seen.append(
            (
                packet.id,
                whole[-1:],
                len(whole),
                len(packet),
                packet.original_len,
                packet.get_mark(),
                packet.verdict,
                packet.conntrack,
                str(packet),
            )
        )
        use(packet)

    flow = queued()
    serve(queue, queue_num, flow, callback)
    text = "UDP packet, 29 bytes"
    assert seen == [
        (1, b"1", 29, 29, 29, 0, None, None, text),
        (2, b"2", 29, 29, 29, 0, None, None, text),
    ]


def test_next_one_leaves_as_it_came(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    def callback(packet: Packet) -> None:
        if packet.id == 1:
            packet.set_payload(bytes(packet)[:-1] + b"!", checksums=True)

    flow = queued()
    serve(queue, queue_num, flow, callback)
    assert flow.receive_all(2) == [b"!", b"2"]


def test_next_one_gets_no_mark(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    marks = []

    def callback(packet: Packet) -> None:
        marks.append(packet.mark)
        if packet.id == 1:
            packet.set_mark(7)
        if len(marks) % 2:
            packet.repeat()

    serve(queue, queue_num, queued(), callback)
    assert marks == [0, 7, 0, 0]


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_one_that_somebody_holds_stays_what_it_is(
    hold: Callable[[Packet], Callable[[], Packet]],
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
) -> None:
    held = []
    serve(queue, queue_num, queued(), lambda packet: held.append(hold(packet)))
    packets = [find() for find in held]
    assert [packet.id for packet in packets] == [1, 2]
    assert packets[0] is not packets[1]


def test_view_outlives_it(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    views: list[memoryview] = []
    serve(queue, queue_num, queued(), lambda packet: views.append(memoryview(packet)))
    assert [bytes(view)[-1:] for view in views] == [b"1", b"2"]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(
    "use", [lambda one: one.set_mark(7), lambda one: one.set_payload(b"3")], ids=["mark", "payload"]
)
def test_what_is_done_to_one_found_among_all_objects_stays_with_it(
    held: bool,
    use: Callable[[Packet], object],
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
) -> None:
    found: list[Packet] = []
    seen = []

    def callback(packet: Packet) -> None:
        seen.append((packet.get_mark(), packet.get_payload()[-1:]))
        assert not any(packet is other for other in found)

    def find() -> None:
        found.extend(one for one in gc.get_objects() if type(one) is Packet)
        assert found
        for packet in found:
            use(packet)
        if not held:
            found.clear()

    flow = queued()
    serve(queue, queue_num, flow, callback, find)
    assert seen == [(0, b"1"), (0, b"2")]
    assert flow.receive_all(2) == [b"1", b"2"]


def test_one_of_another_thread_is_no_reason_to_wait_for_that(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    ran, release = threading.Event(), threading.Lock()

    def callback(packet: Packet) -> None:
        if packet.id == 1:
            packet.accept()

    def run_once() -> None:
        queue.run(count=1)
        ran.set()
        with release:
            pass

    flow = queued()
    queue.bind(queue_num, callback, sock_len=RECEIVE_BUFFER, default_verdict=Verdict.ACCEPT)
    with release:
        running = in_thread(run_once)
        flow.send(b"1", b"2")
        assert ran.wait(TIMEOUT)
        queue.run(count=1)
        assert flow.receive_all(2) == [b"1", b"2"]
    running.result(TIMEOUT)

"""Packets that are pulled: `read()` and `for packet in queue`, and how long their payloads last."""

from __future__ import annotations

import collections
import functools
import gc
import random
import signal
import threading
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from netfilterqueue._channel import alive

from netfilterqueue import COPY_META, NetfilterQueue, Packet
from support import (
    RECEIVE_BUFFER,
    TIMEOUT,
    alarm_when,
    in_thread,
    is_blocked,
    numbered,
    readable,
    udp_data,
    wait_until,
    wait_until_blocked,
    wait_until_polling,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support import UdpFlow


class Handler(NetfilterQueue):
    def handle(self, packet: Packet) -> None:
        packet.accept()


def data_of(packets: list[Packet]) -> list[bytes]:
    return [udp_data(packet) for packet in packets]


def accept_all(packets: list[Packet]) -> list[bytes]:
    """Accept packets, and return what they carry."""
    for packet in packets:
        packet.accept()
    return data_of(packets)


def borrows(packet: Packet) -> bool:
    """Whether the payload is still where it was received, and no copy."""
    with memoryview(packet) as view:
        return not isinstance(view.obj, bytes)


def pull_by_read(queue: NetfilterQueue) -> Iterator[Packet]:
    while packets := queue.read():
        yield from packets


PULLS: dict[str, Callable[[NetfilterQueue], Iterator[Packet]]] = {
    "read": pull_by_read,
    "for": iter,
}


@pytest.fixture(params=PULLS)
def pull(request: pytest.FixtureRequest) -> Callable[[NetfilterQueue], Iterator[Packet]]:
    """Packet after packet, until the queue is stopped: by `read()`, and by iteration."""
    return PULLS[request.param]


class TestRead:
    def test_returns_what_is_pending_in_the_order_queued(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(*numbered(5))
        assert accept_all(queue.read()) == numbered(5)
        assert flow.receive_all(5) == numbered(5)

    def test_returns_no_more_than_one_read_brings(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        queue.bind(queue_num, batch=4, sock_len=RECEIVE_BUFFER)
        queued().send(*numbered(10))
        assert [len(queue.read(count=100)) for _ in range(3)] == [4, 4, 2]

    def test_count_leaves_the_rest_for_the_next(self, queue: NetfilterQueue, flow: UdpFlow) -> None:
        flow.send(*numbered(5))
        assert data_of(queue.read(2)) == [b"0", b"1"]
        assert readable(queue), "event loops come back for the rest"
        flow.send(b"5")
        assert data_of(queue.read(count=2)) == [b"2", b"3"]
        assert data_of(queue.read()) == [b"4"]
        assert data_of(queue.read()) == [b"5"]
        assert not readable(queue)

    @pytest.mark.parametrize("timeout", [0, 0.05])
    def test_is_empty_after_the_timeout(
        self, queue: NetfilterQueue, flow: UdpFlow, timeout: float
    ) -> None:
        start = time.monotonic()
        assert queue.read(timeout=timeout) == []
        assert timeout <= time.monotonic() - start < TIMEOUT

    @pytest.mark.parametrize("timeout", [0, TIMEOUT])
    def test_timeout_does_not_delay_what_is_pending(
        self, queue: NetfilterQueue, flow: UdpFlow, timeout: float
    ) -> None:
        flow.send(b"hello")
        start = time.monotonic()
        assert data_of(queue.read(timeout=timeout)) == [b"hello"]
        assert time.monotonic() - start < TIMEOUT

    @pytest.mark.parametrize("timeout", [None, TIMEOUT])
    def test_waits_for_what_comes_later(
        self, queue: NetfilterQueue, flow: UdpFlow, timeout: float | None
    ) -> None:
        reading = in_thread(queue.read, None, timeout)
        if timeout is None:
            wait_until_blocked(queue.fileno())
        else:
            wait_until_polling()
        flow.send(b"hello")
        assert data_of(reading.result(TIMEOUT)) == [b"hello"]

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"count": 0}, ValueError),
            ({"count": -1}, ValueError),
            ({"count": 1.5}, TypeError),
            ({"count": "1"}, TypeError),
            ({"timeout": -0.1}, ValueError),
            ({"timeout": float("nan")}, ValueError),
            ({"timeout": float("inf")}, ValueError),
            ({"timeout": "soon"}, TypeError),
        ],
        ids=str,
    )
    def test_wrong_argument_takes_no_packet(
        self,
        queue: NetfilterQueue,
        flow: UdpFlow,
        options: dict[str, Any],
        error: type[Exception],
    ) -> None:
        flow.send(b"hello")
        for method in (queue.read, queue.aread):
            with pytest.raises(error, match=next(iter(options))):
                method(**options)
        assert data_of(queue.read()) == [b"hello"]

    def test_sends_pending_verdicts_before_it_waits(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, verdict_delay=60, sock_len=RECEIVE_BUFFER)
        flow.send(b"accepted", b"held")
        packets = queue.read()
        packets[0].accept()
        assert flow.arrived() == []
        assert queue.read(timeout=0) == []
        assert flow.receive() == b"accepted"

    def test_leaves_nothing_for_the_next_binding(
        self, queue: NetfilterQueue, queue_num: int, flow: UdpFlow
    ) -> None:
        flow.send(*numbered(5))
        (packet,) = queue.read(1)
        queue.unbind()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        assert not readable(queue)
        assert queue.read(timeout=0) == []
        assert udp_data(packet) == b"0"
        with pytest.raises(RuntimeError, match="unbound"):
            packet.accept()

    def test_each_packet_goes_to_one_of_several_threads(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        def take() -> list[bytes]:
            taken = []
            while packets := queue.read(count=3):
                taken += accept_all(packets)
            return taken

        reading = [in_thread(take) for _ in range(3)]
        for _ in range(4):
            flow.send(*numbered(100))
            assert sorted(flow.receive_all(100)) == sorted(numbered(100))
        while not all(reader.done() for reader in reading):
            # One that is between two reads does not hear a stop that ends another's.
            queue.stop()
            time.sleep(0.001)
        taken = [data for reader in reading for data in reader.result(TIMEOUT)]
        assert sorted(taken) == sorted(numbered(100) * 4)


class TestIteration:
    def test_yields_packets_in_the_order_queued(self, queue: NetfilterQueue, flow: UdpFlow) -> None:
        flow.send(*numbered(100))
        seen = []
        for packet in queue:
            seen.append(udp_data(packet))
            packet.accept()
            if len(seen) == 100:
                break
        assert seen == flow.receive_all(100) == numbered(100)

    def test_goes_on_where_a_loop_before_was_left(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(*numbered(6))
        seen = []
        for packet in queue:
            seen.append(udp_data(packet))
            if len(seen) == 2:
                break
        assert readable(queue), "event loops come back for the rest"

        def fail_at_the_first() -> None:
            for packet in queue:
                seen.append(udp_data(packet))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail_at_the_first()
        seen += data_of(queue.read())
        assert seen == numbered(6)
        assert queue.read(timeout=0) == []
        assert not readable(queue)

    def test_iterator_left_half_way_and_collected_loses_nothing(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(*numbered(6))
        packets = iter(queue)
        seen = [udp_data(next(packets)), udp_data(next(packets))]
        itself = [packets]
        itself.append(itself)  # type: ignore[arg-type]
        del packets, itself
        gc.collect()
        seen += data_of(queue.read())
        assert seen == numbered(6)
        queue.stop()
        assert queue.read() == [], "a stop lasts until the next loop, as none is under way"

    def test_iterators_side_by_side_share_the_packets(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(*numbered(4))
        one, other = iter(queue), iter(queue)
        pulled = [next(one), next(other), *queue.read(1), next(one)]
        assert data_of(pulled) == numbered(4)
        queue.stop()
        assert list(one) == list(other) == []
        flow.send(b"new")
        assert data_of(queue.read()) == [b"new"]

    def test_stop_that_ends_one_that_is_suspended_ends_one_other_loop_at_the_most(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        """It cannot be known whether its body will ever ask for more."""
        flow.send(*numbered(4))
        suspended = iter(queue)
        seen = [next(suspended)]
        queue.stop()
        assert queue.read() == []
        seen += queue.read(1)
        assert list(suspended) == []
        seen += queue.read(1)
        suspended = iter(queue)
        seen.append(next(suspended))
        queue.stop()
        assert list(suspended) == []
        flow.send(b"4")
        seen += queue.read()
        assert data_of(seen) == numbered(5)

    def test_stop_in_the_body_ends_it_after_the_packet_at_hand(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(*numbered(5))
        seen = []
        for packet in queue:
            seen.append(udp_data(packet))
            packet.accept()
            if len(seen) == 3:
                queue.stop()
        assert seen == flow.arrived() == numbered(3)
        assert data_of(queue.read()) == [b"3", b"4"]

    @pytest.mark.parametrize("end", [NetfilterQueue.unbind, NetfilterQueue.close])
    def test_end_of_the_binding_in_the_body_ends_it(
        self, queue: NetfilterQueue, flow: UdpFlow, end: Callable[[NetfilterQueue], None]
    ) -> None:
        flow.send(*numbered(5))
        for count, packet in enumerate(queue):
            assert count == 0
            packet.accept()
            end(queue)
        assert flow.arrived() == [b"0"]

    def test_does_not_go_on_with_another_binding(
        self, queue: NetfilterQueue, queue_num: int, flow: UdpFlow
    ) -> None:
        flow.send(b"old")
        packets = iter(queue)
        next(packets)
        queue.unbind()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        flow.send(b"new")
        assert list(packets) == []
        assert data_of(queue.read()) == [b"new"]

    def test_sends_pending_verdicts_before_it_waits(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, verdict_delay=60, sock_len=RECEIVE_BUFFER)
        held = []

        def accept_the_first() -> None:
            for packet in queue:
                held.append(packet)
                if len(held) == 1:
                    packet.accept()

        flow.send(b"accepted", b"held")
        wait_until_queued(queue_num, 2)
        looping = in_thread(accept_the_first)
        assert flow.receive() == b"accepted"
        queue.stop()
        looping.result(TIMEOUT)

    def test_slow_body_does_not_keep_packets_of_its_read_from_other_threads(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        """Neither from those that come, nor from those that wait already."""
        flow.send(*numbered(3))
        packets = iter(queue)
        assert udp_data(next(packets)) == b"0"
        assert data_of(in_thread(queue.read).result(TIMEOUT)) == [b"1", b"2"]

        seen: list[bytes] = []
        others_seen = threading.Event()

        def be_slow_with_the_first() -> None:
            for packet in queue:
                seen.append(udp_data(packet))
                packet.drop()
                if len(seen) % 8 == 1:
                    assert others_seen.wait(TIMEOUT)
                if len(seen) % 8 == 0:
                    others_seen.set()

        looping = [in_thread(be_slow_with_the_first) for _ in range(2)]
        # The thread that is woken first may get one packet, or more.
        for count in range(8, 8 * 50 + 1, 8):
            wait_until_blocked(queue.fileno(), 2)
            others_seen.clear()
            flow.send(*numbered(8))
            wait_until(lambda: len(seen) == count, what=f"{count} packets seen")  # noqa: B023
        queue.stop()
        for thread in looping:
            thread.result(TIMEOUT)


class TestEnds:
    """How pulling ends, whichever way packets are pulled."""

    def test_stop_is_heard_by_one_that_waits(
        self,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Iterator[Packet]],
    ) -> None:
        waiting = in_thread(list, pull(queue))
        wait_until_blocked(queue.fileno())
        queue.stop()
        assert waiting.result(TIMEOUT) == []

    @pytest.mark.parametrize("end", [NetfilterQueue.unbind, NetfilterQueue.close])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_end_of_the_binding_is_heard_by_those_that_wait(
        self,
        queue: NetfilterQueue,
        flow: UdpFlow,
        threads: int,
        end: Callable[[NetfilterQueue], None],
    ) -> None:
        waiting = [in_thread(list, iter(queue)) for _ in range(threads)]
        waiting += [in_thread(queue.read) for _ in range(threads)]
        wait_until_blocked(queue.fileno(), 2 * threads)
        end(queue)
        for waiter in waiting:
            assert waiter.result(TIMEOUT) == []

    def test_signal_handler_stops(
        self,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Iterator[Packet]],
    ) -> None:
        with alarm_when(lambda: is_blocked(queue.fileno()), lambda *_: queue.stop()):
            assert list(pull(queue)) == []

    def test_error_of_a_signal_handler_leaves_it(
        self,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Iterator[Packet]],
    ) -> None:
        blocked = functools.partial(is_blocked, queue.fileno())
        with alarm_when(blocked, signal.default_int_handler), pytest.raises(KeyboardInterrupt):
            list(pull(queue))
        flow.send(b"hello")
        assert data_of(queue.read()) == [b"hello"]

    def test_stop_before_it_ends_the_next_and_no_later_one(
        self,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Iterator[Packet]],
    ) -> None:
        flow.send(b"hello")
        queue.stop()
        assert list(pull(queue)) == []
        assert udp_data(next(pull(queue))) == b"hello"

    def test_queue_that_is_not_bound_has_no_packets(
        self, queue: NetfilterQueue, pull: Callable[[NetfilterQueue], Iterator[Packet]]
    ) -> None:
        with pytest.raises(RuntimeError, match="call bind"):
            next(pull(queue))
        queue.close()
        with pytest.raises(ValueError, match="closed"):
            next(pull(queue))


class TestCallbacks:
    """A queue either calls back or is pulled from."""

    @pytest.mark.parametrize(
        "pull",
        [
            NetfilterQueue.read,
            lambda queue: next(iter(queue)),
            NetfilterQueue.aread,
            NetfilterQueue.__aiter__,
        ],
        ids=["read", "for", "aread", "async for"],
    )
    @pytest.mark.parametrize("kind", ["callback", "handle"])
    def test_queue_with_a_callback_cannot_be_pulled_from(
        self,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        kind: str,
        pull: Callable[[NetfilterQueue], object],
    ) -> None:
        flow = queued()
        with NetfilterQueue() if kind == "callback" else Handler() as queue:
            callback = Packet.accept if kind == "callback" else None
            queue.bind(queue_num, callback, sock_len=RECEIVE_BUFFER)
            flow.send(b"hello")
            with pytest.raises(RuntimeError, match=r"use run\(\)"):
                pull(queue)
            assert flow.arrived() == []
            queue.run(count=1)
            assert flow.receive() == b"hello"
            # It does not count as a loop under way, which would have taken this.
            queue.stop()
            queue.run()

    def test_queue_without_a_callback_cannot_be_run(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(b"hello")
        with pytest.raises(RuntimeError, match="without a callback"):
            queue.run()
        with pytest.raises(RuntimeError, match="without a callback"):
            queue.run_socket(queue)  # type: ignore[arg-type]
        assert data_of(queue.read()) == [b"hello"]

    def test_packets_that_run_left_are_not_pulled_after_another_bind(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(3))
        queue.run(count=1)
        queue.unbind()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        flow.send(b"new")
        assert data_of(queue.read()) == [b"new"]


class TestPayload:
    """It is borrowed from the read it came with, and copied where the packet outlives that."""

    def test_stays_right_in_packets_of_many_reads(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        payloads = [data * 20 for data in numbered(1000)]
        kept = []
        for start in range(0, 1000, 20):
            flow.send(*payloads[start : start + 20])
            kept += queue.read()
        random.Random(1).shuffle(kept)
        for packet in kept:
            assert udp_data(packet) == payloads[packet.id - 1]
            packet.drop()
            assert packet.get_payload()[28:] == bytes(packet)[28:] == payloads[packet.id - 1]

    def test_stays_right_after_the_end_of_the_queue(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        other = NetfilterQueue()
        other.bind(queue_num, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(3))
        packets = other.read()
        other.close()
        del other
        assert data_of(packets) == numbered(3)

    def test_is_copied_only_where_it_outlives_two_reads(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        batches = []
        for _ in range(4):
            flow.send(*numbered(3))
            batches.append(queue.read())
        assert [[borrows(packet) for packet in batch] for batch in batches] == [
            [False] * 3,
            [False] * 3,
            [True] * 3,
            [True] * 3,
        ]
        assert [data_of(batch) for batch in batches] == [numbered(3)] * 4

    def test_of_packets_decided_at_once_is_never_copied(
        self,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Iterator[Packet]],
    ) -> None:
        payload = bytes(20_000)
        packets = pull(queue)
        tracemalloc.start()
        try:
            for _ in range(20):
                flow.send(*[payload] * 5)
                for _ in range(5):
                    packet = next(packets)
                    assert borrows(packet)
                    packet.drop()
            assert 0 < tracemalloc.get_traced_memory()[1] < len(payload)
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("held", [0, 1, 5])
    def test_memory_of_reads_is_used_again(
        self, queue: NetfilterQueue, flow: UdpFlow, held: int
    ) -> None:
        """Of reads whose packets are all gone too, or of which some are kept."""
        kept: collections.deque[Packet] = collections.deque(maxlen=500)
        for count in (1, 1, 1, 32, 2, 32, 32, 1) * 5:
            flow.send(*numbered(count))
            received = queue.read()
            assert accept_all(received) == numbered(count)
            kept += received[:held]
            del received
            assert flow.receive_all(count) == numbered(count)
        assert (alive() or {}).get("slabs", 0) <= 5
        assert {udp_data(packet) for packet in kept} <= set(numbered(held))

    def test_view_keeps_it_where_it_was_received(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(b"kept")
        view = memoryview(queue.read()[0])
        for _ in range(8):
            flow.send(b"gone")
            queue.read()
        assert bytes(view[28:]) == b"kept"

    def test_there_is_none_in_copy_meta(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        queue.bind(queue_num, mode=COPY_META, sock_len=RECEIVE_BUFFER)
        flow = queued()
        kept = []
        for _ in range(4):
            flow.send(b"hello")
            kept += queue.read()
        for packet in kept:
            with pytest.raises(RuntimeError, match="COPY_META"):
                packet.get_payload()

    def test_replacement_takes_its_place(self, queue: NetfilterQueue, flow: UdpFlow) -> None:
        kept = []
        for data in numbered(4):
            flow.send(data)
            (packet,) = queue.read()
            packet.set_payload(packet.get_payload()[:-1] + b"x")
            kept.append(packet)
        assert data_of(kept) == [b"x"] * 4
        kept[0].set_payload(None)
        assert udp_data(kept[0]) == b"0"

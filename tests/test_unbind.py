"""`unbind()`, `close()`, and the other ends of a queue."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import NetfilterQueue, Packet
from support import (
    TIMEOUT,
    accepting,
    bound_queues,
    in_thread,
    numbered,
    readable,
    udp_data,
    wait_until,
    wait_until_blocked,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import UdpFlow


def leave_with_block(queue: NetfilterQueue) -> None:
    with queue:
        pass


either_end = pytest.mark.parametrize(
    "end",
    [NetfilterQueue.unbind, NetfilterQueue.close, leave_with_block],
    ids=["unbind", "close", "with"],
)


@either_end
class TestEitherEnd:
    def test_may_come_before_bind_and_again(
        self, queue: NetfilterQueue, end: Callable[[NetfilterQueue], object]
    ) -> None:
        assert end(queue) is None
        assert end(queue) is None

    def test_may_come_again_after_a_binding(
        self, queue: NetfilterQueue, queue_num: int, end: Callable[[NetfilterQueue], object]
    ) -> None:
        queue.bind(queue_num, Packet.accept)
        assert end(queue) is None
        assert bound_queues() == {}
        assert end(queue) is None

    @pytest.mark.parametrize(("path", "ipv6"), [("loopback", True), ("forward", False)])
    def test_makes_the_kernel_drop_what_is_queued(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        end: Callable[[NetfilterQueue], object],
        path: str,
        ipv6: bool,
    ) -> None:
        kept: list[Packet] = []
        flow = queued(path, ipv6=ipv6)
        queue.bind(queue_num, kept.append)
        flow.send(*numbered(3))
        wait_until_queued(queue_num, 3)
        queue.run(block=False)
        assert len(kept) == 3
        flow.send(b"not read")
        wait_until_queued(queue_num, 4)
        end(queue)
        assert bound_queues() == {}
        # What comes later can only arrive after what was queued.
        with NetfilterQueue() as another:
            another.bind(queue_num, Packet.accept)
            flow.send(b"later")
            wait_until_queued(queue_num, 1)
            another.run(block=False)
            assert flow.receive() == b"later"
        assert flow.arrived() == []

    def test_sends_what_is_pending_first(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        end: Callable[[NetfilterQueue], object],
    ) -> None:
        kept: list[Packet] = []
        flow = queued()
        queue.bind(queue_num, kept.append, verdict_delay=60)
        flow.send(*numbered(3))
        queue.run(block=False)
        kept[1].accept()
        kept[0].accept()
        assert flow.arrived() == [], "the third is undecided, so that they wait"
        end(queue)
        assert flow.arrived() == [b"1", b"0"]

    def test_from_another_thread_during_the_callback_lets_run_return_after_it(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        end: Callable[[NetfilterQueue], object],
    ) -> None:
        entered, leave = threading.Event(), threading.Event()
        seen = []

        def judge(packet: Packet) -> None:
            seen.append(udp_data(packet))
            entered.set()
            assert leave.wait(TIMEOUT)
            with pytest.raises(RuntimeError, match=r"^Parent queue has already been unbound$"):
                packet.accept()

        flow = queued()
        queue.bind(queue_num, judge)
        flow.send(*numbered(3))
        running = in_thread(queue.run)
        assert entered.wait(TIMEOUT)
        in_thread(end, queue).result(TIMEOUT)
        assert bound_queues() == {}
        leave.set()
        assert running.result(TIMEOUT) is None
        assert seen == [b"0"]
        assert flow.arrived() == []

    def test_from_another_thread_while_verdicts_are_being_sent_is_heard_and_loses_none(
        self,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        end: Callable[[NetfilterQueue], object],
    ) -> None:
        all_but_one = threading.Event()

        def accept_all_but_the_last(packet: Packet) -> None:
            if packet.id % 100:
                packet.accept()
            else:
                all_but_one.set()

        def end_soon(queue: NetfilterQueue) -> None:
            assert all_but_one.wait(TIMEOUT)
            end(queue)

        flow = queued()
        for _ in range(20):
            with NetfilterQueue() as queue:
                queue.bind(queue_num, accept_all_but_the_last, batch=100, verdict_delay=60)
                all_but_one.clear()
                ending = in_thread(end_soon, queue)
                flow.send(*numbered(100))
                running = in_thread(queue.run)
                ending.result(TIMEOUT)
                running.result(TIMEOUT)
            assert flow.receive_all(99) == numbered(99)

    def test_from_the_callback_ends_run_and_forgets_the_rest_of_the_read(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        end: Callable[[NetfilterQueue], object],
    ) -> None:
        seen: list[bytes] = []
        flow = queued()
        queue.bind(queue_num, accepting(seen, lambda: len(seen) == 2 and end(queue)))
        flow.send(*numbered(5))
        queue.run()
        assert seen == flow.arrived() == numbered(2)
        assert bound_queues() == {}


class TestUnbind:
    def test_in_the_callback_may_be_followed_by_another_bind_and_run(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        seen: list[bytes] = []

        def bind_anew() -> None:
            if seen == [b"0", b"1"]:
                queue.unbind()
                queue.bind(queue_num, accepting(seen))
                flow.send(b"new")

        flow = queued()
        queue.bind(queue_num, accepting(seen, bind_anew))
        flow.send(*numbered(5))
        queue.run()
        queue.run(block=False)
        assert seen == flow.arrived() == [b"0", b"1", b"new"]

    def test_forgets_what_an_exception_left_for_the_next_run(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        seen: list[bytes] = []

        def fail() -> None:
            raise ValueError

        flow = queued()
        queue.bind(queue_num, accepting(seen, fail))
        flow.send(*numbered(5))
        with pytest.raises(ValueError, match=r"^$"):
            queue.run()
        queue.unbind()
        assert not readable(queue)
        queue.bind(queue_num, accepting(seen))
        queue.run(block=False)
        assert seen == flow.arrived() == [b"0"]

    def test_leaves_the_packets_it_took_from_the_queue_readable(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        kept: list[Packet] = []

        def keep(packet: Packet) -> None:
            packet.retain()
            kept.append(packet)

        flow = queued()
        queue.bind(queue_num, keep)
        flow.send(b"payload")
        queue.run(block=False)
        queue.unbind()
        (packet,) = kept
        assert (packet.id, packet.queue_num, packet.verdict) == (1, queue_num, None)
        assert udp_data(packet) == b"payload"
        assert packet.get_mark() == 0


class TestClose:
    def test_closes_the_descriptor(self, queue: NetfilterQueue, queue_num: int) -> None:
        queue.bind(queue_num, Packet.accept)
        fd = queue.get_fd()
        queue.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        for method in (queue.get_fd, queue.fileno):
            with pytest.raises(ValueError, match="closed"):
                method()

    def test_does_not_close_a_descriptor_that_got_the_number_later(
        self, queue: NetfilterQueue
    ) -> None:
        fd = queue.get_fd()
        queue.close()
        taken = os.open(os.devnull, os.O_RDONLY)
        try:
            os.dup2(taken, fd)
            queue.close()
            os.fstat(fd)
        finally:
            os.close(taken)
            if taken != fd:
                os.close(fd)


class TestWith:
    def test_gives_the_queue_itself_and_closes_it(self, queue_num: int) -> None:
        queue = NetfilterQueue()
        with queue as same:
            assert same is queue
            queue.bind(queue_num, Packet.accept)
            assert set(bound_queues()) == {queue_num}
        assert bound_queues() == {}
        with pytest.raises(ValueError, match="closed"):
            queue.get_fd()

    def test_lets_an_exception_pass_and_closes_the_queue_all_the_same(self, queue_num: int) -> None:
        def bind_and_fail(queue: NetfilterQueue) -> None:
            queue.bind(queue_num, Packet.accept)
            raise LookupError("of the block")

        with pytest.raises(LookupError, match="of the block"), NetfilterQueue() as queue:
            bind_and_fail(queue)
        assert bound_queues() == {}
        with pytest.raises(ValueError, match="closed"):
            queue.get_fd()


class TestCollection:
    def test_unbinds_the_queue(self, queue_num: int) -> None:
        queue = NetfilterQueue()
        queue.bind(queue_num, Packet.accept)
        fd = queue.get_fd()
        del queue
        gc.collect()
        assert bound_queues() == {}
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_unbinds_a_queue_whose_callback_refers_to_it(self, queue_num: int) -> None:
        class Firewall:
            def __init__(self) -> None:
                self.queue = NetfilterQueue()
                self.queue.bind(queue_num, self.judge)

            def judge(self, packet: Packet) -> None:
                packet.accept()

        Firewall()
        gc.collect()
        assert bound_queues() == {}

    def test_sends_what_is_pending_first(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        kept: list[Packet] = []
        flow = queued()
        queue = NetfilterQueue()
        queue.bind(queue_num, kept.append, verdict_delay=60)
        flow.send(*numbered(3))
        queue.run(block=False)
        kept[0].accept()
        kept[1].accept()
        assert flow.arrived() == []
        del queue
        kept.clear()
        gc.collect()
        assert bound_queues() == {}
        assert flow.arrived() == numbered(2)

    def test_waits_until_the_last_packet_that_is_kept_is_gone(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        kept: list[Packet] = []
        flow = queued()
        queue = NetfilterQueue()
        reference = weakref.ref(queue)
        queue.bind(queue_num, kept.append)
        flow.send(*numbered(2))
        queue.run(block=False)
        del queue
        gc.collect()
        assert reference() is not None
        kept.pop().accept()
        assert flow.receive() == b"1"
        gc.collect()
        assert set(bound_queues()) == {queue_num}
        kept.pop().accept()
        assert flow.receive() == b"0"
        del kept
        gc.collect()
        assert reference() is None
        assert bound_queues() == {}

    def test_of_a_queue_that_runs_waits_until_it_has_returned(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        def accept(packet: Packet) -> None:
            packet.accept()
            queues.pop().stop()

        flow = queued()
        queues = [NetfilterQueue()]
        queues[0].bind(queue_num, accept)
        fd = queues[0].get_fd()
        running = in_thread(queues[0].run)
        wait_until_blocked(fd)
        flow.send(b"payload")
        assert flow.receive() == b"payload"
        running.result(TIMEOUT)
        del running
        gc.collect()
        wait_until(lambda: bound_queues() == {})

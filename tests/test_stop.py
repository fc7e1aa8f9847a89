"""`stop()`, and what is left after it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import NetfilterQueue, Packet
from support import (
    TIMEOUT,
    accepting,
    in_thread,
    numbered,
    readable,
    wait_until_blocked,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import UdpFlow


def test_from_another_thread_ends_a_run_after_the_packet_at_hand(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def accept(packet: Packet) -> None:
        entered.set()
        assert leave.wait(TIMEOUT)
        packet.accept()

    flow = queued()
    queue.bind(queue_num, accept)
    flow.send(*numbered(3))
    running = in_thread(queue.run)
    assert entered.wait(TIMEOUT)
    queue.stop()
    leave.set()
    running.result(TIMEOUT)
    assert flow.arrived() == [b"0"]


@pytest.mark.parametrize("block", [True, False])
def test_from_the_callback_leaves_the_rest_of_the_read_for_the_next_run(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], block: bool
) -> None:
    seen: list[bytes] = []

    def stop_after_the_third() -> None:
        if len(seen) == 3:
            queue.stop()

    flow = queued()
    queue.bind(queue_num, accepting(seen, stop_after_the_third))
    flow.send(*numbered(8))
    queue.run(block)
    assert seen == flow.arrived() == numbered(3)
    assert readable(queue), "event loops come back for the rest"
    queue.run(block=False)
    assert seen == numbered(8)
    assert flow.arrived() == numbered(8)[3:]
    assert not readable(queue)


def test_from_the_callback_of_a_nested_run_ends_both(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    seen: list[bytes] = []
    flow = queued()
    queue.bind(queue_num, accepting(seen, lambda: queue.run() if len(seen) == 1 else queue.stop()))
    flow.send(*numbered(4))
    queue.run()
    assert seen == numbered(2)
    queue.run(block=False)
    assert seen == numbered(3), "the first is over, so that the callback stops again"


@pytest.mark.parametrize("block", [True, False])
def test_before_run_makes_the_next_run_return_at_once_and_no_later_one(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], block: bool
) -> None:
    flow = queued()
    queue.bind(queue_num, Packet.accept)
    flow.send(b"payload")
    queue.stop()
    queue.stop()
    in_thread(queue.run, block).result(TIMEOUT)
    assert flow.arrived() == []
    assert readable(queue)
    queue.run(block=False)
    assert flow.arrived() == [b"payload"]


def test_while_verdicts_are_being_sent_is_not_missed(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    """The loop looks whether it is to stop, sends what is pending, and goes back to wait: a stop
    in the middle of that, when other threads can run, finds nobody to wake."""
    all_but_one = threading.Event()

    def accept_all_but_the_last(packet: Packet) -> None:
        if packet.id % 100:
            packet.accept()
        else:
            all_but_one.set()

    def stop_soon() -> None:
        assert all_but_one.wait(TIMEOUT)
        queue.stop()

    flow = queued()
    queue.bind(queue_num, accept_all_but_the_last, batch=100, verdict_delay=60)
    for _ in range(20):
        all_but_one.clear()
        stopping = in_thread(stop_soon)
        flow.send(*numbered(100))
        running = in_thread(queue.run)
        stopping.result(TIMEOUT)
        running.result(TIMEOUT)


def test_again_and_again_under_traffic_loses_no_packet(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    flow = queued()
    queue.bind(queue_num, Packet.accept)
    for data in numbered(200):
        running = in_thread(queue.run)
        flow.send(data, data)
        queue.stop()
        running.result(TIMEOUT)
        queue.run(block=False)
        assert flow.receive_all(2) == [data, data]


def test_leaves_packets_that_unbind_makes_the_kernel_drop(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> None:
    seen: list[bytes] = []
    accept = accepting(seen, queue.stop)
    flow = queued()
    queue.bind(queue_num, accept)
    flow.send(*numbered(5))
    queue.run()
    queue.unbind()
    assert not readable(queue)
    queue.bind(queue_num, accept)
    assert not readable(queue)
    flow.send(b"new")
    queue.run()
    assert seen == flow.arrived() == [b"0", b"new"]


def test_does_not_outlive_the_binding(queue: NetfilterQueue, queue_num: int) -> None:
    queue.stop()
    queue.bind(queue_num, Packet.accept)
    running = in_thread(queue.run)
    wait_until_blocked(queue.get_fd())
    queue.stop()
    running.result(TIMEOUT)


@pytest.mark.parametrize("end", [NetfilterQueue.unbind, NetfilterQueue.close])
def test_of_a_queue_that_is_not_bound_does_nothing(
    queue: NetfilterQueue, queue_num: int, end: Callable[[NetfilterQueue], None]
) -> None:
    queue.stop()
    queue.bind(queue_num, Packet.accept)
    end(queue)
    queue.stop()

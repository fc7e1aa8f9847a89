"""What becomes of packets: STOP, REPEAT and other queues, and all changes in one message."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict
from support import RECEIVE_BUFFER, bound_queues, numbered, run_until, udp_data, wait_until_queued

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.testing import Node, Rule
    from support import Traffic, UdpFlow

COUNT = 7


@pytest.fixture
def second(router: Node) -> Iterator[NetfilterQueue]:
    with NetfilterQueue() as opened:
        yield opened


def udp_to(flow: UdpFlow) -> tuple[Any, ...]:
    return "-p", "udp", "--dport", flow.port


class TestStop:
    @pytest.mark.parametrize(
        ("decide", "later"), [(Packet.accept, COUNT), (Packet.stop, 0)], ids=["accept", "stop"]
    )
    def test_it_skips_the_later_tables_of_the_hook_and_no_other(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        count: Callable[..., Callable[[], int]],
        decide: Callable[[Packet], None],
        later: int,
    ) -> None:
        flow = traffic.udp("forward")
        same_table = count("FORWARD", *udp_to(flow), table="mangle")
        rules("FORWARD", *udp_to(flow), queue=queue_num, table="mangle")
        later_table = count("FORWARD", *udp_to(flow))
        later_hook = count("POSTROUTING", *udp_to(flow), table="mangle")
        queue.bind(queue_num, decide, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(COUNT))
        run_until(queue, lambda: later_hook() == COUNT)
        assert flow.receive_all(COUNT) == numbered(COUNT)
        assert (same_table(), later_table(), later_hook()) == (COUNT, later, COUNT)

    def test_callback_may_return_it(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        count: Callable[..., Callable[[], int]],
    ) -> None:
        flow = traffic.udp("forward")
        rules("FORWARD", *udp_to(flow), queue=queue_num, table="mangle")
        later_table = count("FORWARD", *udp_to(flow))
        queue.bind(queue_num, lambda packet: Verdict.STOP, sock_len=RECEIVE_BUFFER)
        flow.send(b"hello")
        run_until(queue, lambda: bound_queues()[queue_num].id_sequence == 1)
        run_until(queue, flow.arrived)
        assert later_table() == 0


def test_repeated_packets_meet_every_rule_again(
    queue: NetfilterQueue,
    queue_num: int,
    traffic: Traffic,
    rules: Callable[..., Rule],
    count: Callable[..., Callable[[], int]],
) -> None:
    def repeat_until_marked(packet: Packet) -> None:
        seen.append(packet.mark)
        packet.set_mark(packet.mark + 1)
        packet.repeat()

    seen: list[int] = []
    flow = traffic.udp("forward")
    first_rule = count("FORWARD", *udp_to(flow))
    rules("FORWARD", *udp_to(flow), "-m", "mark", "!", "--mark", 3, queue=queue_num)
    last_rule = count("FORWARD", *udp_to(flow))
    queue.bind(queue_num, repeat_until_marked, sock_len=RECEIVE_BUFFER)
    flow.send(*numbered(COUNT))
    run_until(queue, lambda: len(seen) == 3 * COUNT)
    assert sorted(flow.receive_all(COUNT)) == numbered(COUNT)
    assert sorted(seen) == sorted([0, 1, 2] * COUNT)
    assert (first_rule(), last_rule()) == (4 * COUNT, COUNT)


class TestRequeue:
    def test_other_queue_gets_each_packet_once_and_decides_it(
        self,
        queue: NetfilterQueue,
        second: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
    ) -> None:
        def decide(packet: Packet) -> None:
            data = udp_data(packet)
            seen.append((packet.queue_num, data))
            if data != b"0":
                packet.accept()
            else:
                packet.drop()

        seen: list[tuple[int, bytes]] = []
        flow = queued("forward")
        other = queue_num + 30000
        queue.bind(queue_num, lambda packet: packet.requeue(other), sock_len=RECEIVE_BUFFER)
        second.bind(other, decide, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(COUNT))
        run_until(queue, lambda: bound_queues()[other].id_sequence == COUNT)
        assert bound_queues()[queue_num].depth == 0
        run_until(second, lambda: len(seen) == COUNT)
        assert seen == [(other, data) for data in numbered(COUNT)]
        assert flow.receive_all(COUNT - 1) == numbered(COUNT)[1:]
        assert bound_queues()[queue_num].id_sequence == COUNT

    def test_to_its_own_queue_it_comes_back_last(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        def requeue_the_first(packet: Packet) -> None:
            seen.append(udp_data(packet))
            if len(seen) == 1:
                packet.requeue(queue_num)
            else:
                packet.accept()

        seen: list[bytes] = []
        flow = queued("forward")
        queue.bind(queue_num, requeue_the_first, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(3))
        wait_until_queued(queue_num, 3)
        run_until(queue, lambda: len(seen) == 4)
        assert seen == [b"0", b"1", b"2", b"0"]
        assert flow.receive_all(3) == [b"1", b"2", b"0"]

    @pytest.mark.parametrize("bypass", [False, True])
    def test_where_nobody_listens_it_is_dropped_or_accepted(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        count: Callable[..., Callable[[], int]],
        bypass: bool,
    ) -> None:
        flow = traffic.udp("forward")
        rules("FORWARD", *udp_to(flow), "-m", "mark", "--mark", 0, queue=queue_num)
        passed = count("POSTROUTING", *udp_to(flow), table="mangle")

        def requeue(packet: Packet) -> None:
            if udp_data(packet) == b"last":
                packet.accept()
            else:
                packet.requeue(65535, bypass)

        queue.bind(queue_num, requeue, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(COUNT), b"last")
        expected = [*numbered(COUNT), b"last"] if bypass else [b"last"]
        run_until(queue, lambda: bound_queues()[queue_num].depth == 0 and passed())
        assert flow.receive_all(len(expected)) == expected
        assert flow.arrived() == []
        assert passed() == len(expected)

    def test_changes_come_along(
        self,
        queue: NetfilterQueue,
        second: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
    ) -> None:
        seen: list[Packet] = []
        flow = queued("forward")
        other = queue_num + 30000
        change_and_requeue = change_and(lambda packet: packet.requeue(other))
        queue.bind(queue_num, change_and_requeue, sock_len=RECEIVE_BUFFER)
        second.bind(other, seen.append, sock_len=RECEIVE_BUFFER)
        flow.send(b"hello")
        run_until(queue, lambda: bound_queues()[other].depth == 1)
        run_until(second, lambda: seen)
        assert (seen[0].mark, seen[0].priority, len(seen[0])) == (0xFEDCBA98, 0x10002, 31)
        seen.pop().accept()
        assert flow.receive() == b"new"


def change_and(decide: Callable[[Packet], None]) -> Callable[[Packet], None]:
    """Change the payload, the mark and the priority of a datagram, and decide it."""

    def callback(packet: Packet) -> None:
        header = bytearray(packet.get_payload()[:28])
        header[24:26] = struct.pack("!H", 8 + 3)
        packet.set_payload(bytes(header) + b"new", checksums=True)
        packet.set_mark(0xFEDCBA98)
        packet.set_priority(0x10002)
        decide(packet)

    return callback


@pytest.mark.parametrize("decide", [Packet.accept, Packet.stop, Packet.repeat])
def test_changes_of_all_kinds_are_seen_by_what_comes_next(
    queue: NetfilterQueue,
    second: NetfilterQueue,
    queue_num: int,
    traffic: Traffic,
    rules: Callable[..., Rule],
    count: Callable[..., Callable[[], int]],
    decide: Callable[[Packet], None],
) -> None:
    """In the same chain for a packet that is repeated, at the next hook for all."""
    seen: list[Packet] = []
    other = queue_num + 30000
    flow = traffic.udp("forward")
    unmarked = ("-m", "mark", "--mark", 0)
    marked = ("-m", "mark", "--mark", 0xFEDCBA98, "-m", "length", "--length", 31)
    rules("FORWARD", *udp_to(flow), *unmarked, queue=queue_num, table="mangle")
    in_chain = count("FORWARD", *udp_to(flow), *marked, table="mangle")
    after = count("POSTROUTING", *udp_to(flow), *marked, table="mangle")
    rules("POSTROUTING", *udp_to(flow), queue=other, table="mangle")
    queue.bind(queue_num, change_and(decide), sock_len=RECEIVE_BUFFER)
    second.bind(other, seen.append, sock_len=RECEIVE_BUFFER)
    flow.send(*numbered(COUNT))
    run_until(queue, lambda: bound_queues()[other].depth == COUNT)
    run_until(second, lambda: len(seen) == COUNT)
    assert {(packet.mark, packet.priority) for packet in seen} == {(0xFEDCBA98, 0x10002)}
    for packet in seen:
        packet.accept()
    assert flow.receive_all(COUNT) == [b"new"] * COUNT
    assert (in_chain(), after()) == (COUNT if decide is Packet.repeat else 0, COUNT)


@pytest.mark.parametrize("value", [0, 0xFFFFFFFF])
def test_mark_and_priority_can_be_anything_that_32_bits_hold(
    queue: NetfilterQueue,
    second: NetfilterQueue,
    queue_num: int,
    traffic: Traffic,
    rules: Callable[..., Rule],
    value: int,
) -> None:
    def change(packet: Packet) -> None:
        packet.set_mark(value)
        packet.set_priority(value)
        packet.accept()

    seen: list[Packet] = []
    other = queue_num + 30000
    flow = traffic.udp("forward")
    rules("PREROUTING", *udp_to(flow), "-j", "MARK", "--set-mark", 5, table="mangle")
    rules("FORWARD", *udp_to(flow), "-j", "CLASSIFY", "--set-class", "1:1", table="mangle")
    rules("FORWARD", *udp_to(flow), queue=queue_num)
    rules("POSTROUTING", *udp_to(flow), queue=other, table="mangle")
    queue.bind(queue_num, change, sock_len=RECEIVE_BUFFER)
    second.bind(other, seen.append, sock_len=RECEIVE_BUFFER)
    flow.send(b"hello")
    run_until(queue, lambda: bound_queues()[other].depth == 1)
    run_until(second, lambda: seen)
    assert (seen[0].mark, seen[0].priority) == (value, value)
    seen.pop().drop()

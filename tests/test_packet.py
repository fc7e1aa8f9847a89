"""What the kernel says of a packet, the verdicts and marks given to it, and the type itself."""

from __future__ import annotations

import enum
import queue as queues
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from netfilterqueue import Hook, NetfilterQueue, Packet, Verdict
from netfilterqueue.testing import packet as packet_of
from support import (
    RECEIVE_BUFFER,
    TIMEOUT,
    QueuedUdp,
    UdpFlow,
    in_thread,
    run_until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Node, Rule

DECIDED = "^Verdict already given for this packet$"
UNBOUND = "^Parent queue has already been unbound$"

# Each byte another one: what is swapped does not look the same.
MARK = 0x01020304

VERDICTS = {
    Verdict.ACCEPT: Packet.accept,
    Verdict.DROP: Packet.drop,
    Verdict.REPEAT: Packet.repeat,
}

both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
all_verdicts = pytest.mark.parametrize("verdict", VERDICTS, ids=lambda verdict: verdict.name)


class Way(NamedTuple):
    """A hook, a way of packets over it, and the interfaces that are known there."""

    hook: Hook
    path: str
    indev: str | None
    outdev: str | None


WAYS = [
    Way(Hook.PREROUTING, "forward", "left", None),
    Way(Hook.INPUT, "input", "left", None),
    Way(Hook.INPUT, "loopback", "lo", None),
    Way(Hook.FORWARD, "forward", "left", "right"),
    Way(Hook.OUTPUT, "output", None, "right"),
    Way(Hook.POSTROUTING, "output", None, "right"),
]
ARRIVING = (Hook.PREROUTING, Hook.INPUT, Hook.FORWARD)


def ways(*hooks: Hook) -> pytest.MarkDecorator:
    chosen = [way for way in WAYS if way.hook in hooks]
    return pytest.mark.parametrize("way", chosen, ids=lambda way: f"{way.hook.name}-{way.path}")


def queued_on(queued_udp: Callable[..., QueuedUdp], way: Way, **options: object) -> QueuedUdp:
    # The mangle table has all five chains.
    return queued_udp(way.path, chain=way.hook.name, table="mangle", **options)


def interface_index(name: str | None) -> int:
    return 0 if name is None else socket.if_nametoindex(name)


class TestAttributes:
    @both_families
    @ways(*Hook)
    def test_hook_and_interfaces_are_where_the_packet_was_queued(
        self, queued_udp: Callable[..., QueuedUdp], way: Way, ipv6: bool
    ) -> None:
        packet = queued_on(queued_udp, way, ipv6=ipv6).deliver_one()
        assert packet.hook == way.hook
        assert packet.indev == interface_index(way.indev)
        assert packet.outdev == interface_index(way.outdev)
        assert packet.physindev == packet.physoutdev == 0

    @both_families
    @ways(*ARRIVING)
    def test_timestamp_is_the_time_of_arrival(
        self, queued_udp: Callable[..., QueuedUdp], way: Way, ipv6: bool
    ) -> None:
        queued = queued_on(queued_udp, way, ipv6=ipv6)
        # The kernel turns time stamps on in the background, so that the first packets of a host may
        # come without.
        wait_until(lambda: queued.deliver_one().get_timestamp() > 0)
        before = time.time()
        packet = queued.deliver_one()
        timestamp = packet.get_timestamp()
        assert type(timestamp) is float
        # It has whole microseconds.
        assert before - 2e-6 <= timestamp <= time.time()

    @both_families
    @ways(Hook.OUTPUT, Hook.POSTROUTING)
    def test_timestamp_is_zero_on_leaving_packets(
        self, queued_udp: Callable[..., QueuedUdp], way: Way, ipv6: bool
    ) -> None:
        timestamp = queued_on(queued_udp, way, ipv6=ipv6).deliver_one().get_timestamp()
        assert type(timestamp) is float
        assert timestamp == 0.0

    @both_families
    @ways(*ARRIVING)
    def test_hw_address_is_the_senders_six_bytes(
        self,
        queued_udp: Callable[..., QueuedUdp],
        hosts: tuple[Node, Node],
        way: Way,
        ipv6: bool,
    ) -> None:
        packet = queued_on(queued_udp, way, ipv6=ipv6).deliver_one()
        sender = "00:00:00:00:00:00" if way.path == "loopback" else hosts[0].mac
        assert packet.get_hw() == bytes.fromhex(sender.replace(":", ""))

    @both_families
    @ways(Hook.OUTPUT, Hook.POSTROUTING)
    def test_hw_address_is_none_on_leaving_packets(
        self, queued_udp: Callable[..., QueuedUdp], way: Way, ipv6: bool
    ) -> None:
        assert queued_on(queued_udp, way, ipv6=ipv6).deliver_one().get_hw() is None

    @pytest.mark.parametrize(("ipv6", "protocol"), [(False, 0x0800), (True, 0x86DD)])
    def test_hw_protocol_is_the_ethertype(
        self, queued_udp: Callable[..., QueuedUdp], ipv6: bool, protocol: int
    ) -> None:
        assert queued_udp(ipv6=ipv6).deliver_one().hw_protocol == protocol

    def test_ids_count_from_one(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        packets = queued_udp().deliver(b"a", b"b", b"c")
        assert [packet.id for packet in packets] == [1, 2, 3]

    def test_queue_num_is_the_queues(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        assert queued_udp().deliver_one().queue_num == queue_num

    @pytest.mark.parametrize("queue_num", [0, 0x0102, 0xFFFF])
    def test_queue_num_may_be_any_of_sixteen_bits(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        packet = queued_udp().deliver_one()
        assert packet.queue_num == queue_num
        packet.accept()
        assert packet.verdict is Verdict.ACCEPT

    def test_all_stay_readable_after_verdict_and_callback_and_unbind(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def read(packet: Packet) -> tuple[object, ...]:
            return (
                *(packet.id, packet.queue_num, packet.hw_protocol, packet.hook, packet.mark),
                *(packet.indev, packet.outdev, packet.physindev, packet.physoutdev),
                *(packet.get_mark(), packet.get_timestamp(), packet.get_hw()),
                *(packet.get_payload_len(), len(packet)),
            )

        seen: list[tuple[object, ...]] = []
        queued = queued_udp("input", lambda packet: seen.append(read(packet)))
        packet = queued.deliver_one()
        packet.accept()
        seen.append(read(packet))
        queued.queue.unbind()
        queued.queue.close()
        assert seen == [read(packet)] * 2
        assert seen[0][0] == 1


class FlagMark(enum.IntFlag):
    SEEN = 4


class Number:
    """An integer of another kind, such as NumPy's."""

    def __index__(self) -> int:
        return MARK

    __int__ = __index__


class TestMark:
    @both_families
    def test_mark_is_what_an_earlier_rule_gave(
        self, queued_udp: Callable[..., QueuedUdp], rules: Callable[..., Rule], ipv6: bool
    ) -> None:
        queued = queued_udp("input", ipv6=ipv6)
        target = ("-j", "MARK", "--set-mark", hex(MARK))
        rules("PREROUTING", "-p", "udp", *target, table="mangle", ipv6=ipv6)
        packet = queued.deliver_one()
        assert packet.mark == packet.get_mark() == MARK

    def test_mark_is_zero_without_one(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        packet = queued_udp().deliver_one()
        assert packet.mark == packet.get_mark() == 0

    @both_families
    @pytest.mark.parametrize("mark", [1, MARK, 0xFFFFFFFF])
    def test_given_mark_is_seen_by_a_later_rule(
        self,
        queued_udp: Callable[..., QueuedUdp],
        rules: Callable[..., Rule],
        ipv6: bool,
        mark: int,
    ) -> None:
        queued = queued_udp(chain="INPUT", table="mangle", ipv6=ipv6)
        rules("INPUT", "-m", "mark", "!", "--mark", hex(mark), "-j", "DROP", ipv6=ipv6)
        unmarked, marked = queued.deliver(b"unmarked", b"marked")
        marked.set_mark(mark)
        unmarked.accept()
        marked.accept()
        assert queued.flow.receive() == b"marked"
        assert queued.flow.arrived() == []

    def test_mark_zero_takes_a_mark_away(
        self, queued_udp: Callable[..., QueuedUdp], rules: Callable[..., Rule]
    ) -> None:
        rules("PREROUTING", "-j", "MARK", "--set-mark", "5", table="mangle")
        queued = queued_udp(chain="INPUT", table="mangle")
        rules("INPUT", "-m", "mark", "--mark", "5", "-j", "DROP")
        still, no_more = queued.deliver(b"still marked", b"no longer marked")
        no_more.set_mark(0)
        assert no_more.get_mark() == 0
        still.accept()
        no_more.accept()
        assert queued.flow.receive() == b"no longer marked"
        assert queued.flow.arrived() == []

    def test_setting_changes_get_mark_and_not_the_attribute(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        packet = queued_udp().deliver_one()
        for mark in (7, 0, 0xFFFFFFFF):
            packet.set_mark(mark)
            assert packet.get_mark() == mark
            assert packet.mark == 0
        packet.accept()
        assert packet.get_mark() == 0xFFFFFFFF
        packet.set_mark(mark=8)
        assert packet.get_mark() == 8

    @pytest.mark.parametrize(
        ("given", "mark"), [(True, 1), (FlagMark.SEEN, 4), (Number(), MARK), (5.0, 5)]
    )
    def test_any_kind_of_number_will_do(self, given: Any, mark: int) -> None:
        packet = packet_of(b"payload")
        packet.set_mark(given)
        assert packet.get_mark() == mark

    @pytest.mark.parametrize("mark", [-1, 1 << 32, 1 << 64, -(1 << 63)])
    def test_number_beyond_32_bits_is_an_overflow(self, mark: int) -> None:
        packet = packet_of(b"payload", mark=7)
        with pytest.raises(OverflowError, match=f"{mark} .*32 bits.* 0 to 4294967295"):
            packet.set_mark(mark)
        assert packet.get_mark() == 7

    @pytest.mark.parametrize("mark", ["7", b"7", None, [7]])
    def test_what_is_no_number_is_a_type_error(self, mark: Any) -> None:
        packet = packet_of(b"payload", mark=7)
        with pytest.raises(TypeError, match=rf"\b{type(mark).__name__}\b"):
            packet.set_mark(mark)
        assert packet.get_mark() == 7


class TestVerdicts:
    @both_families
    @pytest.mark.parametrize("path", ["loopback", "input", "forward", "output"])
    def test_accepted_packets_arrive_and_dropped_ones_do_not(
        self, queued_udp: Callable[..., QueuedUdp], path: str, ipv6: bool
    ) -> None:
        queued = queued_udp(path, ipv6=ipv6)
        dropped, accepted = queued.deliver(b"dropped", b"accepted")
        assert queued.flow.arrived() == []
        dropped.drop()
        accepted.accept()
        assert queued.flow.receive() == b"accepted"
        assert queued.flow.arrived() == []

    @both_families
    def test_repeated_packet_comes_back_with_a_new_id(
        self, queued_udp: Callable[..., QueuedUdp], ipv6: bool
    ) -> None:
        queued = queued_udp("input", ipv6=ipv6)
        first = queued.deliver_one()
        first.repeat()
        run_until(queued.queue, lambda: len(queued.packets) == 2)
        again = queued.packets[1]
        assert (first.id, again.id) == (1, 2)
        assert queued.flow.arrived() == []
        again.accept()
        assert queued.flow.receive() == b"hello"

    def test_repeat_goes_on_with_the_mark_so_that_a_rule_can_end_the_round(
        self, queue: NetfilterQueue, queue_num: int, rules: Callable[..., Rule], traffic: Any
    ) -> None:
        flow = traffic.udp("forward")
        packets: list[Packet] = []
        queue.bind(queue_num, packets.append, sock_len=RECEIVE_BUFFER)
        rules("FORWARD", "-m", "mark", "!", "--mark", hex(MARK), queue=queue_num)
        flow.send(b"hello")
        run_until(queue, lambda: packets)
        packets[0].set_mark(MARK)
        packets[0].repeat()
        assert flow.receive() == b"hello"
        assert len(packets) == 1

    def test_repeated_packet_has_the_mark_that_it_was_given(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        queued = queued_udp()
        packet = queued.deliver_one()
        packet.set_mark(MARK)
        packet.repeat()
        run_until(queued.queue, lambda: len(queued.packets) == 2)
        assert queued.packets[1].mark == MARK

    @all_verdicts
    def test_verdict_shows_what_was_given(
        self, queued_udp: Callable[..., QueuedUdp], verdict: Verdict
    ) -> None:
        queued = queued_udp()
        packet = queued.deliver_one()
        assert packet.verdict is None
        VERDICTS[verdict](packet)
        assert packet.verdict is verdict
        queued.queue.unbind()
        assert packet.verdict is verdict

    @all_verdicts
    def test_second_verdict_is_refused(
        self, queued_udp: Callable[..., QueuedUdp], verdict: Verdict
    ) -> None:
        packet = queued_udp().deliver_one()
        VERDICTS[verdict](packet)
        for give_second in VERDICTS.values():
            with pytest.raises(RuntimeError, match=DECIDED):
                give_second(packet)
        assert packet.verdict is verdict

    def test_verdict_after_unbind_is_refused(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        queued = queued_udp()
        packet = queued.deliver_one()
        queued.queue.unbind()
        for give in VERDICTS.values():
            with pytest.raises(RuntimeError, match=UNBOUND):
                give(packet)
        assert packet.verdict is None

    def test_verdict_after_a_later_bind_is_refused(
        self, queued_udp: Callable[..., QueuedUdp], queue: NetfilterQueue, queue_num: int
    ) -> None:
        queued = queued_udp()
        old = queued.deliver_one()
        queue.unbind()
        queue.bind(queue_num, queued.packets.append, sock_len=RECEIVE_BUFFER)
        new = queued.deliver_one()
        # The same number now stands for another packet.
        assert old.id == new.id
        for give in VERDICTS.values():
            with pytest.raises(RuntimeError, match=UNBOUND):
                give(old)
        new.accept()
        assert queued.flow.receive() == b"hello"

    def test_second_verdict_after_unbind_is_refused_as_the_second(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        queued = queued_udp()
        packet = queued.deliver_one()
        packet.accept()
        queued.queue.unbind()
        with pytest.raises(RuntimeError, match=DECIDED):
            packet.accept()

    @both_families
    def test_packets_go_on_in_the_order_of_their_verdicts(
        self, queued_udp: Callable[..., QueuedUdp], ipv6: bool
    ) -> None:
        queued = queued_udp("input", ipv6=ipv6)
        packets = queued.deliver(b"0", b"1", b"2", b"3", b"4")
        for position in (3, 0, 4, 2, 1):
            packets[position].accept()
        assert queued.flow.receive_all(5) == [b"3", b"0", b"4", b"2", b"1"]

    def test_verdict_may_come_many_reads_after_the_callback(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        queued = queued_udp(callback=lambda packet: packet.id > 1 and packet.accept())
        held = queued.deliver_one(b"held")
        for number in range(20):
            queued.deliver_one(b"%d" % number)
            assert queued.flow.receive() == b"%d" % number
        held.accept()
        assert queued.flow.receive() == b"held"

    def test_verdicts_may_come_from_other_threads_while_one_runs_the_queue(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        undecided: queues.SimpleQueue[Packet | None] = queues.SimpleQueue()
        payloads = [b"%d" % number for number in range(90)]

        delivered = 0

        def deliver(packet: Packet) -> None:
            nonlocal delivered
            undecided.put(packet)
            delivered += 1

        def decide() -> int:
            count = 0
            while packet := undecided.get():
                (packet.drop if packet.id % 3 == 0 else packet.accept)()
                count += 1
            return count

        queue.bind(queue_num, deliver, sock_len=RECEIVE_BUFFER)
        deciders = [in_thread(decide) for _ in range(3)]
        runner = in_thread(queue.run)
        flow.send(*payloads)
        # Ids count from 1.
        expected = [payload for number, payload in enumerate(payloads, 1) if number % 3]
        received = flow.receive_all(len(expected))
        wait_until(lambda: delivered == len(payloads))
        queue.stop()
        runner.result(TIMEOUT)
        for _ in deciders:
            undecided.put(None)
        assert sum(decider.result(TIMEOUT) for decider in deciders) == len(payloads)
        assert sorted(received) == sorted(expected)
        assert flow.arrived() == []

    @all_verdicts
    def test_verdicts_take_no_arguments(self, verdict: Verdict) -> None:
        packet = packet_of(b"payload")
        give: Callable[..., None] = VERDICTS[verdict]
        with pytest.raises(TypeError, match="argument"):
            give(packet, 1)
        assert packet.verdict is None

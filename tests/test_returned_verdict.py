"""A callback that returns a `Verdict` gives it to its packet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict
from support import CHAINS, numbered, udp_data, wait_until_queued

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Rule
    from support import Traffic, UdpFlow


@pytest.mark.parametrize("path", CHAINS)
def test_accept_lets_the_packet_go_on_and_drop_discards_it(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], path: str
) -> None:
    def judge(packet: Packet) -> Verdict:
        return Verdict.DROP if int(udp_data(packet)) % 2 else Verdict.ACCEPT

    flow = queued(path)
    queue.bind(queue_num, judge)
    flow.send(*numbered(6))
    wait_until_queued(queue_num, 6)
    queue.run(block=False)
    wait_until_queued(queue_num, 0)
    assert flow.receive_all(3) == [b"0", b"2", b"4"]
    assert flow.arrived() == []


def test_repeat_sends_the_packet_through_the_chain_again_with_its_mark(
    queue: NetfilterQueue, queue_num: int, traffic: Traffic, rules: Callable[..., Rule]
) -> None:
    def judge(packet: Packet) -> Verdict:
        marks.append(packet.mark)
        packet.set_mark(packet.mark + 1)
        return Verdict.ACCEPT if packet.mark == 2 else Verdict.REPEAT

    marks: list[int] = []
    flow = traffic.udp()
    rules("INPUT", "-p", "udp", "--dport", flow.port, queue=queue_num)
    queue.bind(queue_num, judge)
    flow.send(b"payload")
    while not flow.arrived():
        queue.run(block=False)
    assert marks == [0, 1, 2]


@pytest.mark.parametrize("verdict", [Verdict.STOP, Verdict.ACCEPT])
def test_stop_skips_the_later_tables_of_the_hook_and_accept_does_not(
    queue: NetfilterQueue,
    queue_num: int,
    traffic: Traffic,
    rules: Callable[..., Rule],
    verdict: Verdict,
) -> None:
    flow = traffic.udp()
    match = ("INPUT", "-p", "udp", "--dport", flow.port)
    rules(*match, queue=queue_num, table="mangle")
    rules(*match, "-j", "DROP", table="filter")
    queue.bind(queue_num, lambda _: verdict)
    flow.send(b"payload")
    queue.run(block=False)
    wait_until_queued(queue_num, 0)
    assert flow.arrived() == ([b"payload"] if verdict is Verdict.STOP else [])


@pytest.mark.parametrize("verdict", [Verdict.STOLEN, Verdict.QUEUE])
def test_that_no_callback_can_give_is_a_value_error_and_the_packet_stays_undecided(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    verdict: Verdict,
) -> None:
    def judge(packet: Packet) -> Verdict:
        kept.append(packet)
        return verdict if len(kept) == 1 else Verdict.ACCEPT

    kept: list[Packet] = []
    flow = queued()
    queue.bind(queue_num, judge)
    flow.send(*numbered(2))
    with pytest.raises(ValueError, match=f"{verdict.name}.*DROP, ACCEPT, REPEAT or STOP"):
        queue.run()
    assert kept[0].verdict is None
    assert udp_data(kept[0]) == b"0"
    queue.run(block=False)
    kept[0].accept()
    assert flow.receive_all(2) == [b"1", b"0"]


@pytest.mark.parametrize("verdict", Verdict)
def test_leaves_a_verdict_alone_that_the_packet_has_already(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    verdict: Verdict,
) -> None:
    def judge(packet: Packet) -> Verdict:
        packet.accept()
        return verdict

    flow = queued()
    queue.bind(queue_num, judge)
    flow.send(b"payload")
    if verdict in (Verdict.STOLEN, Verdict.QUEUE):
        with pytest.raises(ValueError, match=verdict.name):
            queue.run()
    else:
        queue.run(block=False)
    assert flow.arrived() == [b"payload"]


@pytest.mark.parametrize("answer", [True, 1, 0, False, "ACCEPT", object()])
def test_is_a_verdict_only_and_anything_else_is_ignored(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], answer: Any
) -> None:
    def keep(packet: Packet) -> Any:
        kept.append(packet)
        return answer

    kept: list[Packet] = []
    flow = queued()
    queue.bind(queue_num, keep)
    flow.send(b"payload")
    queue.run(block=False)
    assert kept[0].verdict is None
    wait_until_queued(queue_num, 1)
    kept[0].accept()
    assert flow.receive() == b"payload"


def test_of_an_overridden_handle_counts_too(queue_num: int, queued: Callable[..., UdpFlow]) -> None:
    class Accepting(NetfilterQueue):
        def handle(self, packet: Packet) -> Verdict:
            return Verdict.ACCEPT

    flow = queued()
    with Accepting() as queue:
        queue.bind(queue_num)
        flow.send(b"payload")
        queue.run(block=False)
    assert flow.receive() == b"payload"

"""Queues in use: the situations that the kernel's own tests of queues are about.

Those that need what not every kernel has are in `test_scenarios_stock.py`.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import struct
from collections import Counter
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from messages import FakeSocket, simple_packets, verdict_request
from netfilterqueue import Hook, NetfilterQueue, Packet, Verdict
from support import (
    CHAINS,
    RECEIVE_BUFFER,
    TIMEOUT,
    UdpFlow,
    bound_queues,
    in_thread,
    numbered,
    run_until,
    udp_data,
    wait_until,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Node, Rule
    from support import Program, QueuedUdp, Traffic

both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])

# The hooks that a packet on each path passes.
HOOKS_ON = {
    "loopback": [Hook.OUTPUT, Hook.POSTROUTING, Hook.PREROUTING, Hook.INPUT],
    "input": [Hook.PREROUTING, Hook.INPUT],
    "forward": [Hook.PREROUTING, Hook.FORWARD, Hook.POSTROUTING],
    "output": [Hook.OUTPUT, Hook.POSTROUTING],
}


def run_until_decided(queue: NetfilterQueue, queue_num: int, count: int) -> None:
    """Run a queue until so many packets have come since it was bound, and none is left in it."""

    def decided() -> bool:
        row = bound_queues()[queue_num]
        return row.id_sequence == count and row.depth == 0

    run_until(queue, decided, what=f"{count} packets decided")


class TestBypass:
    @both_families
    def test_it_lets_packets_pass_while_nobody_listens_and_then_no_more(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        ipv6: bool,
    ) -> None:
        flow = traffic.udp("forward", ipv6=ipv6)
        match = ("FORWARD", "-p", "udp", "--dport", flow.port)
        rules(*match, queue=queue_num, bypass=True, ipv6=ipv6)
        flow.send(*numbered(3))
        assert flow.receive_all(3) == numbered(3)
        queue.bind(queue_num, Packet.drop, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(3))
        run_until_decided(queue, queue_num, 3)
        queue.unbind()
        flow.send(b"after")
        assert flow.receive() == b"after"

    @both_families
    def test_without_it_packets_are_dropped_while_nobody_listens(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], ipv6: bool
    ) -> None:
        flow = queued("forward", ipv6=ipv6)
        flow.send(*numbered(3))
        queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER)
        flow.send(b"after")
        run_until_decided(queue, queue_num, 1)
        assert flow.receive() == b"after"
        assert flow.arrived() == []


class TestHooks:
    @both_families
    @pytest.mark.parametrize("path", HOOKS_ON)
    def test_each_hook_on_the_way_queues_each_packet_once(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        path: str,
        ipv6: bool,
    ) -> None:
        def accept(packet: Packet) -> None:
            passed[udp_data(packet)].append(Hook(packet.hook))
            packet.accept()

        flow = traffic.udp(path, ipv6=ipv6)
        for hook in Hook:
            match = ("-p", "udp", "--dport", flow.port)
            rules(hook.name, *match, queue=queue_num, table="mangle", ipv6=ipv6)
        passed: dict[bytes, list[Hook]] = {payload: [] for payload in numbered(40)}
        queue.bind(queue_num, accept, sock_len=RECEIVE_BUFFER)
        flow.send(*passed)
        expected = len(passed) * len(HOOKS_ON[path])
        run_until(queue, lambda: sum(map(len, passed.values())) >= expected)
        assert sorted(flow.receive_all(len(passed))) == sorted(passed)
        # One hook after the other, for each of them.
        assert all(hooks == HOOKS_ON[path] for hooks in passed.values())
        assert bound_queues()[queue_num].id_sequence == expected


class TestTwoChains:
    """The tables mangle and filter each have a chain at the hook, and both queue."""

    @pytest.fixture
    def chains(self, traffic: Traffic, rules: Callable[..., Rule]) -> Callable[[int, int], UdpFlow]:
        def queue_to(first: int, second: int) -> UdpFlow:
            flow = traffic.udp("forward")
            for table, number in (("mangle", first), ("filter", second)):
                rules("FORWARD", "-p", "udp", "--dport", flow.port, queue=number, table=table)
            return flow

        return queue_to

    def test_one_queue_gets_each_packet_twice(
        self, queue: NetfilterQueue, queue_num: int, chains: Callable[[int, int], UdpFlow]
    ) -> None:
        seen: list[tuple[bytes, int]] = []

        def mark_and_accept(packet: Packet) -> None:
            seen.append((udp_data(packet), packet.mark))
            packet.set_mark(packet.mark + 1)
            packet.accept()

        flow = chains(queue_num, queue_num)
        queue.bind(queue_num, mark_and_accept, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(20))
        run_until(queue, lambda: len(seen) == 40)
        assert sorted(seen) == sorted((data, mark) for data in numbered(20) for mark in (0, 1))
        assert sorted(flow.receive_all(20)) == sorted(numbered(20))

    @pytest.mark.parametrize(
        ("verdict", "second_sees", "arriving"),
        [(Verdict.ACCEPT, 6, 6), (Verdict.DROP, 0, 0), (Verdict.STOP, 0, 6)],
    )
    def test_the_first_decides_what_the_second_sees(
        self,
        queue: NetfilterQueue,
        chains: Callable[[int, int], UdpFlow],
        verdict: Verdict,
        second_sees: int,
        arriving: int,
    ) -> None:
        first, second = 40100, 40101
        flow = chains(first, second)
        queue.bind(first, lambda packet: verdict, sock_len=RECEIVE_BUFFER)
        with NetfilterQueue() as later:
            later.bind(second, Packet.accept, sock_len=RECEIVE_BUFFER)
            flow.send(*numbered(6))
            run_until_decided(queue, first, 6)
            run_until_decided(later, second, second_sees)
            assert flow.receive_all(arriving) == numbered(arriving)
            assert flow.arrived() == []


class TestRequeue:
    @both_families
    def test_later_and_in_another_order(
        self, queue: NetfilterQueue, queued: Callable[..., UdpFlow], ipv6: bool
    ) -> None:
        first, second = 40300, 40301
        flow = queued("forward", number=first, ipv6=ipv6)
        held: list[Packet] = []
        seen: list[tuple[bytes, int]] = []

        def note_and_accept(packet: Packet) -> None:
            seen.append((udp_data(packet), packet.mark))
            packet.accept()

        queue.bind(first, held.append, verdict_delay=0, sock_len=RECEIVE_BUFFER)
        with NetfilterQueue() as later:
            later.bind(second, note_and_accept, sock_len=RECEIVE_BUFFER)
            flow.send(*numbered(10))
            run_until(queue, lambda: len(held) == 10)
            for packet in reversed(held):
                packet.set_mark(packet.id)
                packet.requeue(second)
                # Meanwhile the first queue goes on.
                queue.run(block=False)
            run_until_decided(later, second, 10)
        expected = list(zip(reversed(numbered(10)), range(10, 0, -1)))
        assert seen == expected
        assert flow.receive_all(10) == [data for data, _ in expected]

    @pytest.mark.parametrize("bypass", [False, True])
    def test_to_where_nobody_listens(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        bypass: bool,
    ) -> None:
        flow = queued("forward")
        queue.bind(
            queue_num, lambda packet: packet.requeue(40302, bypass=bypass), sock_len=RECEIVE_BUFFER
        )
        flow.send(*numbered(3))
        run_until_decided(queue, queue_num, 3)
        queue.unbind()
        assert flow.arrived() == (numbered(3) if bypass else [])

    @pytest.mark.parametrize("gso", [False, True], ids=["segmented", "gso"])
    def test_connections_in_bulk_by_way_of_two_queues(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        gso: bool,
    ) -> None:
        second = 40303
        rules("INPUT", "-p", "tcp", queue=queue_num)
        data = random.Random(0).randbytes(1_000_000)
        queue.bind(queue_num, lambda p: p.requeue(second), gso=gso, sock_len=RECEIVE_BUFFER)
        with NetfilterQueue() as later:
            later.bind(second, Packet.accept, gso=gso, sock_len=RECEIVE_BUFFER)
            running = in_thread(later.run)
            transfer = traffic.tcp("loopback", data)
            run_until(queue, lambda: transfer.done)
            intact = transfer.result() == data
            found = later.stats()
            later.stop()
            running.result(TIMEOUT)
        assert intact
        # Not all: it goes on with what ends the connection, and TCP makes good what has no room.
        assert queue.stats().verdicts[Verdict.QUEUE] >= found.packets
        assert found.bytes > len(data)

    def test_round_a_circle_of_queues(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        """A packet may come back to a queue that it has left, with a new number each time."""
        ids: list[int] = []

        def go_round(packet: Packet) -> None:
            ids.append(packet.id)
            packet.set_mark(packet.mark + 1)
            if packet.mark < 10:
                packet.requeue(queue_num)
            else:
                packet.accept()

        flow = queued("forward")
        queue.bind(queue_num, go_round, sock_len=RECEIVE_BUFFER)
        flow.send(b"hello")
        run_until_decided(queue, queue_num, 11)
        assert ids == list(range(1, 12))
        assert flow.receive() == b"hello"


class TestTcpInBulk:
    @both_families
    @pytest.mark.parametrize("gso", [False, True], ids=["segmented", "gso"])
    @pytest.mark.parametrize("path", ["forward", "loopback"])
    def test_all_arrives(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        path: str,
        gso: bool,
        ipv6: bool,
    ) -> None:
        sizes: Counter[int] = Counter()

        def accept(packet: Packet) -> None:
            sizes[len(packet)] += 1
            # Netlink cannot carry the longest of loopback whole.
            assert packet.truncated == (packet.original_len > 65531)
            packet.accept()

        # Both directions: the acknowledgements, too.
        rules(CHAINS[path], "-p", "tcp", queue=queue_num, ipv6=ipv6)
        queue.bind(queue_num, accept, gso=gso, max_len=4096, sock_len=RECEIVE_BUFFER)
        data = random.Random(0).randbytes(4_000_000)
        transfer = traffic.tcp(path, data, ipv6=ipv6)
        run_until(queue, lambda: transfer.done)
        assert transfer.result() == data
        assert sum(size * count for size, count in sizes.items()) > len(data)
        if path == "forward":
            assert (max(sizes) > 1500) == gso
        else:
            assert max(sizes) > 32768


class TestSocketsThatClose:
    """The socket that a packet came from, or goes to, ends while the packet is queued."""

    @pytest.mark.parametrize("path", CHAINS)
    @pytest.mark.parametrize("chain", ["POSTROUTING", "PREROUTING"])
    def test_datagrams_of_a_sender_that_has_gone_arrive(
        self,
        queue_num: int,
        queue: NetfilterQueue,
        traffic: Traffic,
        rules: Callable[..., Rule],
        path: str,
        chain: str,
    ) -> None:
        if Hook[chain] not in HOOKS_ON[path]:
            chain = CHAINS[path]
        flow = traffic.udp(path)
        rules(chain, "-p", "udp", "--dport", flow.port, queue=queue_num, table="mangle")
        queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(5))
        wait_until_queued(queue_num, 5)
        flow.sender.close()
        run_until_decided(queue, queue_num, 5)
        assert flow.receive_all(5) == numbered(5)

    def test_datagrams_for_a_receiver_that_has_gone_find_no_port(
        self, queue_num: int, queue: NetfilterQueue, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued("input")
        queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(5))
        wait_until_queued(queue_num, 5)
        flow.receiver.close()
        before = udp_counter("NoPorts")
        queue.run(block=False)
        wait_until(lambda: udp_counter("NoPorts") == before + 5)
        # As without a queue, the sender hears of it.
        with pytest.raises(ConnectionRefusedError):
            flow.send(b"once more")

    @pytest.mark.parametrize("chain", ["INPUT", "OUTPUT"])
    @pytest.mark.parametrize("flags", ["SYN", "SYN,ACK", "ACK"], ids=["syn", "syn-ack", "data"])
    def test_segments_of_connections_that_have_gone_are_decided_like_others(
        self,
        queue_num: int,
        queue: NetfilterQueue,
        traffic: Traffic,
        rules: Callable[..., Rule],
        router: Node,
        chain: str,
        flags: str,
    ) -> None:
        match = ("-p", "tcp", "--tcp-flags", "SYN,ACK,FIN,RST", flags)
        rule = rules(chain, *match, queue=queue_num)
        queue.bind(queue_num, Packet.accept, uid_gid=True, sock_len=RECEIVE_BUFFER)
        listener = router.socket(socket.AF_INET, socket.SOCK_STREAM)
        client = router.socket(socket.AF_INET, socket.SOCK_STREAM)
        with closing(listener), closing(client):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            client.setblocking(False)
            # To close it means to forget what was not sent, and all that may come.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.connect_ex(listener.getsockname())
            wait_until(lambda: bound_queues()[queue_num].depth)
        rule.remove()
        run_until(queue, lambda: not bound_queues()[queue_num].depth)
        # New connections come about as ever.
        assert traffic.tcp("loopback", b"data").result() == b"data"


def udp_counter(name: str) -> int:
    """A counter of this network namespace (RFC 4113)."""
    with open("/proc/net/snmp", encoding="ascii") as file:
        names, values = (line.split() for line in file if line.startswith("Udp:"))
    return int(values[names.index(name)])


class TestNatRaces:
    """Several packets of a new flow are queued before the first of them, let go, makes the flow
    known to connection tracking: each of them believes that it is the first."""

    @pytest.fixture
    def translated(
        self,
        traffic: Traffic,
        rules: Callable[..., Rule],
        hosts: tuple[Node, Node],
        router: Node,
        queue_num: int,
    ) -> UdpFlow:
        """From the left host to the router's address, which stands for the right host."""
        flow = traffic.udp("forward")
        left, right = hosts
        match = ("-p", "udp", "--dport", flow.port)
        to = ("-j", "DNAT", "--to-destination", right.ipv4)
        rules("PREROUTING", *match, "-d", router.ipv4, *to, table="nat")
        rules("POSTROUTING", *match, "-j", "MASQUERADE", table="nat")
        rules("FORWARD", *match, queue=queue_num)
        flow.sender.close()
        flow.sender = left.socket(socket.AF_INET, socket.SOCK_DGRAM)
        flow.sender.settimeout(TIMEOUT)
        flow.sender.connect((router.ipv4, flow.port))
        return flow

    @pytest.mark.parametrize("order", ["as-sent", "reversed"])
    def test_all_arrive_as_one_flow(
        self, queue: NetfilterQueue, queue_num: int, translated: UdpFlow, order: str
    ) -> None:
        packets: list[Packet] = []
        queue.bind(queue_num, packets.append, batch=1, sock_len=RECEIVE_BUFFER)
        translated.send(*numbered(8))
        run_until(queue, lambda: len(packets) == 8)
        for packet in packets if order == "as-sent" else reversed(packets):
            packet.accept()
        arrived = [translated.receiver.recvfrom(2048) for _ in packets]
        assert sorted(data for data, _ in arrived) == numbered(8)
        (sender,) = {address for _, address in arrived}
        # The way back is translated, too.
        translated.receiver.sendto(b"answer", sender)
        assert translated.sender.recv(2048) == b"answer"

    def test_verdicts_of_several_threads_at_once(
        self, queue: NetfilterQueue, queue_num: int, translated: UdpFlow
    ) -> None:
        packets: list[Packet] = []
        queue.bind(queue_num, packets.append, batch=1, sock_len=RECEIVE_BUFFER)
        translated.send(*numbered(40))
        run_until(queue, lambda: len(packets) == 40)

        def accept(part: list[Packet]) -> None:
            for packet in part:
                packet.accept()

        for deciding in [in_thread(accept, packets[first::4]) for first in range(4)]:
            deciding.result(TIMEOUT)
        assert sorted(translated.receive_all(40)) == sorted(numbered(40))


def decide_by_number(packet: Packet) -> None:
    """Of each four packets one is dropped, one gets a longer payload, and one goes three rounds."""
    number = int(udp_data(packet))
    if number % 4 == 1:
        packet.drop()
        return
    if number % 4 == 3 and packet.mark < 2:
        packet.set_mark(packet.mark + 1)
        packet.repeat()
        return
    if number % 4 == 2:
        packet.set_payload(packet.get_payload() + b"!", checksums=True)
    if number % 64 == 0:
        in_thread(packet.accept)
    else:
        packet.accept()


def send_and_receive(flow: UdpFlow, payloads: list[bytes], arriving: int) -> list[bytes]:
    """Send payloads, never so many that a buffer overruns, and return what arrives of them."""
    arrived = []
    for first in range(0, len(payloads), 20):
        flow.send(*payloads[first : first + 20])
        arrived += sorted(flow.receive_all(arriving), key=lambda data: int(data.rstrip(b"!")))
    return arrived


class TestStress:
    def test_several_queues_decide_in_every_way_at_once(
        self, queued: Callable[..., UdpFlow]
    ) -> None:
        payloads, numbers = numbered(1000), range(40200, 40204)
        flows = [queued(number=number) for number in numbers]
        with ExitStack() as stack:
            queues = [stack.enter_context(NetfilterQueue()) for _ in numbers]
            for queue, number in zip(queues, numbers):
                queue.bind(number, decide_by_number, sock_len=RECEIVE_BUFFER)
            running = [in_thread(queue.run) for queue in queues]
            for sending in [in_thread(send_and_receive, flow, payloads, 15) for flow in flows]:
                assert sending.result(8 * TIMEOUT) == [
                    payload + b"!" * (number % 4 == 2)
                    for number, payload in enumerate(payloads)
                    if number % 4 != 1
                ]
            assert all(flow.arrived() == [] for flow in flows)
            # Each packet once, and two rounds more for a quarter of them.
            assert all(bound_queues()[number].id_sequence == 1500 for number in numbers)
            for queue, runner in zip(queues, running):
                queue.stop()
                runner.result(TIMEOUT)


PROGRAM_THAT_EXITS = """
    import os, signal, sys
    from netfilterqueue import NetfilterQueue

    queue_num, count, end = sys.argv[1:]
    kept = []
    queue = NetfilterQueue()
    queue.bind(int(queue_num), lambda packet: kept.append(packet), sock_len=212992)
    print("bound")
    queue.run(count=int(count))
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif end == "_exit":
        os._exit(0)
"""


class TestProgramThatExits:
    @pytest.mark.parametrize("end", ["return", "_exit", "kill"])
    def test_what_it_left_queued_is_dropped_and_the_number_is_free(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        run_program: Callable[..., Program],
        end: str,
    ) -> None:
        flow = queued("forward")
        program = run_program(PROGRAM_THAT_EXITS, str(queue_num), "5", end)
        program.wait_for("bound")
        flow.send(*numbered(5))
        assert program.wait() == (-signal.SIGKILL if end == "kill" else 0)
        wait_until(lambda: not bound_queues())
        queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER)
        flow.send(b"after")
        run_until_decided(queue, queue_num, 1)
        assert flow.receive() == b"after"
        assert flow.arrived() == []


# Ids that no packet in the queue has, by the latest that was queued.
UNKNOWN: dict[str, Callable[[Packet], int]] = {
    "past": lambda latest: latest.id - 1,
    "future": lambda latest: latest.id + 1,
    "nobody": lambda latest: 0xFFFFFFFF,
}


def verdict_by_packet(udp: QueuedUdp, id: int, verdict: Verdict) -> None:
    """Give a packet's verdict that the queue did not get from the kernel."""
    udp.queue.run_socket(FakeSocket(*simple_packets(id, queue_num=udp.packets[0].queue_num)))
    packet = udp.packets.pop()
    {Verdict.ACCEPT: packet.accept, Verdict.DROP: packet.drop, Verdict.REPEAT: packet.repeat}[
        verdict
    ]()
    assert packet.verdict is verdict


def verdict_by_hand(udp: QueuedUdp, id: int, verdict: Verdict) -> None:
    """Send one that is no packet's."""
    os.write(udp.queue.fileno(), verdict_request(udp.packets[0].queue_num, id, verdict))


class TestOrderOfVerdicts:
    @pytest.mark.parametrize("batch", [1, 32])
    def test_packets_go_on_as_they_are_decided(
        self, queued_udp: Callable[..., QueuedUdp], batch: int
    ) -> None:
        udp = queued_udp("forward", batch=batch)
        packets = udp.deliver(*numbered(60))
        decided = list(enumerate(packets))
        random.Random(batch).shuffle(decided)
        for number, packet in decided:
            packet.drop() if number % 3 == 0 else packet.accept()
        expected = [b"%d" % number for number, _ in decided if number % 3]
        assert udp.flow.receive_all(len(expected)) == expected
        wait_until_queued(packets[0].queue_num, 0)
        assert udp.flow.arrived() == []

    @pytest.mark.parametrize("by", [verdict_by_packet, verdict_by_hand])
    @pytest.mark.parametrize("of", UNKNOWN)
    def test_verdicts_on_packets_that_are_not_queued_change_nothing_and_are_counted(
        self,
        queued_udp: Callable[..., QueuedUdp],
        of: str,
        by: Callable[[QueuedUdp, int, Verdict], None],
    ) -> None:
        # At once: what is past must not wait to be sent.
        udp = queued_udp("forward", verdict_delay=0)
        first, second = udp.deliver(b"first", b"second")
        first.accept()
        verdicts = (Verdict.ACCEPT, Verdict.DROP, Verdict.REPEAT)
        for verdict in verdicts:
            by(udp, UNKNOWN[of](second), verdict)
        third = udp.deliver_one(b"third")
        third.accept()
        second.accept()
        assert udp.flow.receive_all(3) == [b"first", b"third", b"second"]
        assert udp.flow.arrived() == []
        found = udp.queue.stats()
        # The kernel's answers tell what was asked for.
        if by is verdict_by_packet:
            assert (found.verdict_errors, found.request_errors) == ({errno.ENOENT: 3}, 0)
            assert [found.verdicts[verdict] for verdict in verdicts] == [4, 1, 1]
        else:
            assert (found.verdict_errors, found.request_errors) == ({}, 3)

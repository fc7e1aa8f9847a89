"""What the kernel's own tests of queues are about, as far as it needs what not every kernel has:
nftables' queue statement, the bridge family, conntrack attributes, SCTP. See `ci/vm`.
"""

from __future__ import annotations

import random
import socket
import struct
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import Hook, NetfilterQueue, Packet
from netfilterqueue.conntrack import ConntrackState, ConntrackStatus, ConntrackTuple
from support import (
    LEFT_MAC,
    RECEIVE_BUFFER,
    RIGHT_MAC,
    QueuedUdp,
    Route,
    numbered,
    run_until,
    udp_data,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.conntrack import Conntrack
    from netfilterqueue.testing import Node, Rule
    from support import Traffic

pytestmark = pytest.mark.stock_kernel

both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])


class TestNftables:
    @both_families
    def test_statement_queues_packets_of_two_base_chains(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        nft: Callable[..., None],
        traffic: Traffic,
        ipv6: bool,
    ) -> None:
        seen: list[bytes] = []

        def accept(packet: Packet) -> None:
            seen.append(udp_data(packet))
            packet.accept()

        flow = traffic.udp("forward", ipv6=ipv6)
        queue.bind(queue_num, accept, sock_len=RECEIVE_BUFFER)
        for priority in (0, 10):
            nft(
                f"chain forward {{ type filter hook forward priority {priority};"
                f" udp dport {flow.port} queue to {queue_num}; }}",
                family="inet",
            )
        flow.send(*numbered(5))
        run_until(queue, lambda: len(seen) == 10)
        assert sorted(seen) == sorted(2 * numbered(5))
        assert sorted(flow.receive_all(5)) == numbered(5)

    @pytest.mark.parametrize("bypass", [False, True])
    def test_bypass_lets_packets_pass_while_nobody_listens(
        self, nft: Callable[..., None], queue_num: int, traffic: Traffic, bypass: bool
    ) -> None:
        flow = traffic.udp("input")
        nft(
            "chain input { type filter hook input priority 0;"
            f" udp dport {flow.port} queue {'flags bypass' if bypass else ''} to {queue_num}; }}"
        )
        flow.send(*numbered(3))
        assert flow.arrived() == (numbered(3) if bypass else [])


class TestSctp:
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
    ) -> None:
        sizes: list[int] = []

        def accept(packet: Packet) -> None:
            sizes.append(len(packet))
            assert packet.get_payload()[9] == socket.IPPROTO_SCTP
            packet.accept()

        rules("FORWARD" if path == "forward" else "INPUT", "-p", "sctp", queue=queue_num)
        queue.bind(queue_num, accept, gso=gso, max_len=4096, sock_len=RECEIVE_BUFFER)
        data = random.Random(0).randbytes(300_000)
        transfer = traffic.sctp(path, data)
        run_until(queue, lambda: transfer.done)
        assert transfer.result() == data
        assert sum(sizes) > len(data)
        # What is longer than its way allows was cut into what fits.
        assert gso or path == "loopback" or max(sizes) <= 1500


class TestBridgeFamily:
    @pytest.fixture
    def queued_on_bridge(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        nft: Callable[..., None],
        traffic: Traffic,
        hosts: tuple[Node, Node],
        bridged_hosts: tuple[str, str],
    ) -> Callable[[str], QueuedUdp]:
        """Queue the datagrams on a bridge at a hook: `queued_on_bridge("forward")`."""

        def start(hook: str) -> QueuedUdp:
            packets: list[Packet] = []

            def keep(packet: Packet) -> None:
                packet.retain()
                packets.append(packet)

            queue.bind(queue_num, keep, sock_len=RECEIVE_BUFFER)
            nft(
                f"chain c {{ type filter hook {hook} priority filter;"
                f" meta protocol ip queue to {queue_num}; }}",
                family="bridge",
            )
            flow = traffic.udp_over(Route(*hosts, bridged_hosts[1], socket.AF_INET))
            return QueuedUdp(flow, queue, packets)

        return start

    @pytest.mark.parametrize(
        ("hook", "ports"),
        [
            (Hook.PREROUTING, ("port0", None)),
            (Hook.FORWARD, ("port0", "port1")),
            (Hook.POSTROUTING, (None, "port1")),
        ],
    )
    def test_frame_shows_its_ports_and_its_header_and_arrives(
        self,
        queued_on_bridge: Callable[[str], QueuedUdp],
        hook: Hook,
        ports: tuple[str | None, str | None],
    ) -> None:
        udp = queued_on_bridge(hook.name.lower())
        for packet, data in zip(udp.deliver(*numbered(5)), numbered(5)):
            assert udp_data(packet) == data
            assert packet.hook == hook
            assert packet.hw_protocol == 0x0800
            assert packet.l2_header == RIGHT_MAC + LEFT_MAC + b"\x08\x00"
            assert packet.get_hw() == (LEFT_MAC if ports[0] else None)
            assert (packet.physindev_name, packet.physoutdev_name) == ports
            packet.accept()
        assert udp.flow.receive_all(5) == numbered(5)

    def test_dropped_frame_does_not_arrive_and_a_changed_one_does(
        self, queued_on_bridge: Callable[[str], QueuedUdp]
    ) -> None:
        udp = queued_on_bridge("forward")
        dropped, changed = udp.deliver(b"dropped", b"hello")
        dropped.drop()
        changed.set_payload(changed.get_payload() + b", bridge", checksums=True)
        changed.accept()
        assert udp.flow.receive() == b"hello, bridge"
        assert udp.flow.arrived() == []


class TestConntrack:
    """What connection tracking says about packets that are forwarded, and is told by verdicts."""

    @pytest.fixture
    def tracked(
        self, queue: NetfilterQueue, queue_num: int, nft: Callable[..., None]
    ) -> Callable[..., list[Packet]]:
        """`tracked(17, callback)`: queue all UDP; packets are kept, and accepted at once."""

        def bind(
            protocol: int, callback: Callable[[Packet], object] = id, **options: Any
        ) -> list[Packet]:
            packets: list[Packet] = []

            def keep(packet: Packet) -> None:
                packet.retain()
                packets.append(packet)
                callback(packet)
                packet.accept()

            queue.bind(queue_num, keep, conntrack=True, sock_len=RECEIVE_BUFFER, **options)
            # Connections have room for labels once there is a rule that sets one.
            nft(
                "chain not_used { ct label set 1; }\n"
                "chain zone { type filter hook prerouting priority raw; ct zone set 3; }\n"
                "chain forward { type filter hook forward priority filter;"
                f" meta l4proto {protocol} queue to {queue_num}; }}",
                family="inet",
            )
            return packets

        return bind

    @both_families
    def test_flow_of_datagrams_from_its_first_to_its_third(
        self,
        queue: NetfilterQueue,
        tracked: Callable[..., list[Packet]],
        traffic: Traffic,
        hosts: tuple[Node, Node],
        ipv6: bool,
    ) -> None:
        packets = tracked(socket.IPPROTO_UDP)
        flow = traffic.udp("forward", ipv6=ipv6)
        flow.send(b"question")
        run_until(queue, lambda: len(packets) == 1)
        _, sender = flow.receiver.recvfrom(2048)
        flow.receiver.sendto(b"answer", sender)
        run_until(queue, lambda: len(packets) == 2)
        flow.send(b"thanks")
        run_until(queue, lambda: len(packets) == 3)
        first, second, third = map(conntrack_of, packets)
        assert first.state is ConntrackState.NEW
        assert second.state is ConntrackState.ESTABLISHED_REPLY
        assert third.state is ConntrackState.ESTABLISHED
        left, right = (host.ipv6 if ipv6 else host.ipv4 for host in hosts)
        for conntrack in (first, second, third):
            assert conntrack.original == ConntrackTuple(17, left, right, sender[1], flow.port)
            assert conntrack.reply == ConntrackTuple(17, right, left, flow.port, sender[1])
            assert conntrack.zone == 3
            assert conntrack.id == first.id is not None
        assert not first.status & (ConntrackStatus.CONFIRMED | ConntrackStatus.SEEN_REPLY)
        assert second.status & ConntrackStatus.CONFIRMED
        assert second.status & ConntrackStatus.SEEN_REPLY
        assert second.timeout

    @both_families
    def test_echo_has_no_ports(
        self,
        queue: NetfilterQueue,
        tracked: Callable[..., list[Packet]],
        traffic: Traffic,
        ipv6: bool,
    ) -> None:
        packets = tracked(socket.IPPROTO_ICMPV6 if ipv6 else socket.IPPROTO_ICMP)
        ping = traffic.ping("forward", ipv6=ipv6)
        ping.send(b"data")
        run_until(queue, lambda: len(packets) == 2)
        assert ping.receive() == b"data"
        for packet in packets:
            original, reply = conntrack_of(packet).original, conntrack_of(packet).reply
            assert (original.icmp_type, reply.icmp_type) == (ping.request_type, ping.reply_type)
            assert (original.icmp_code, original.icmp_id) == (0, ping.identifier)
            assert original.source_port is original.destination_port is None

    @pytest.mark.parametrize("protocol", [socket.IPPROTO_TCP, socket.IPPROTO_SCTP])
    def test_connection_is_established(
        self,
        queue: NetfilterQueue,
        tracked: Callable[..., list[Packet]],
        traffic: Traffic,
        protocol: int,
    ) -> None:
        packets = tracked(protocol)
        start = traffic.tcp if protocol == socket.IPPROTO_TCP else traffic.sctp
        transfer = start("forward", b"data")
        run_until(queue, lambda: transfer.done)
        assert transfer.result() == b"data"
        tracks = list(map(conntrack_of, packets))
        for conntrack in tracks:
            assert conntrack.original.protocol == conntrack.reply.protocol == protocol
            assert conntrack.original.destination_port == transfer.port
            assert conntrack.reply.source_port == transfer.port
        assert tracks[0].state is ConntrackState.NEW
        assert any(conntrack.state is ConntrackState.ESTABLISHED for conntrack in tracks)
        assert any(conntrack.status & ConntrackStatus.ASSURED for conntrack in tracks)

    def test_translated_destination_shows_in_the_reply(
        self,
        queue: NetfilterQueue,
        tracked: Callable[..., list[Packet]],
        traffic: Traffic,
        rules: Callable[..., Rule],
        router: Node,
        hosts: tuple[Node, Node],
    ) -> None:
        flow = traffic.udp("forward")
        to = ("-j", "DNAT", "--to-destination", hosts[1].ipv4)
        rules("PREROUTING", "-p", "udp", "-d", router.ipv4, *to, table="nat")
        packets = tracked(socket.IPPROTO_UDP)
        flow.sender.connect((router.ipv4, flow.port))
        flow.send(b"hello")
        run_until(queue, lambda: packets)
        conntrack = conntrack_of(packets[0])
        assert conntrack.original.destination == router.ipv4
        assert conntrack.reply.source == hosts[1].ipv4
        assert conntrack.status & ConntrackStatus.DST_NAT
        assert flow.receive() == b"hello"

    def test_mark_and_labels_set_by_a_verdict_stay_with_the_connection(
        self, queue: NetfilterQueue, tracked: Callable[..., list[Packet]], traffic: Traffic
    ) -> None:
        def mark_first(packet: Packet) -> None:
            if packet.id == 1:
                packet.set_conntrack_mark(0xDEADBEEF)
                packet.set_conntrack_labels(labels)

        labels = struct.pack("=QQ", 1 << 5, 1 << 63)
        packets = tracked(socket.IPPROTO_UDP, mark_first)
        flow = traffic.udp("forward")
        flow.send(b"0")
        run_until(queue, lambda: len(packets) == 1)
        flow.send(b"1")
        run_until(queue, lambda: len(packets) == 2)
        before, after = map(conntrack_of, packets)
        assert (before.mark, after.mark) == (0, 0xDEADBEEF)
        assert (before.labels or bytes(16), after.labels) == (bytes(16), labels)
        assert flow.receive_all(2) == numbered(2)

    @pytest.mark.parametrize("gso", [False, True], ids=["segmented", "gso"])
    def test_datagrams_received_together_stay_apart(
        self,
        queue: NetfilterQueue,
        tracked: Callable[..., list[Packet]],
        traffic: Traffic,
        router: Node,
        hosts: tuple[Node, Node],
        gso: bool,
    ) -> None:
        """The router's interface puts them into one packet, a list, as it receives them (GRO)."""
        flow = traffic.udp("forward")
        flow.sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        arrived: list[bytes] = []

        def all_arrived() -> bool:
            arrived.extend(flow.arrived())
            return len(arrived) == 20

        with ExitStack() as features:
            for node, interface, name, value in (
                (hosts[0], "eth0", "tx-udp-segmentation", "off"),
                (router, "left", "generic-receive-offload", "on"),
                (router, "left", "rx-gro-list", "on"),
            ):
                features.enter_context(feature(node, interface, name, value))
            packets = tracked(socket.IPPROTO_UDP, gso=gso)
            datagrams = [bytes([number]) * 1000 for number in range(20)]
            flow.send(b"".join(datagrams))
            run_until(queue, all_arrived)
        assert arrived == datagrams
        assert all(packet.conntrack for packet in packets)
        if gso:
            assert len(packets) < 20
            assert packets[0].gso
        else:
            assert [udp_data(packet) for packet in packets] == datagrams


UDP_SEGMENT = 103  # <linux/udp.h>


@contextmanager
def feature(node: Node, interface: str, name: str, value: str) -> Iterator[None]:
    """Switch a feature of an interface for a while."""
    node.run(["ethtool", "-K", interface, name, value])
    try:
        yield
    finally:
        node.run(["ethtool", "-K", interface, name, {"on": "off", "off": "on"}[value]])


def conntrack_of(packet: Packet) -> Conntrack:
    assert packet.conntrack is not None
    return packet.conntrack

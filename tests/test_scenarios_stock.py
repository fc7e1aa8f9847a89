"""What the kernel's own tests of queues are about, as far as it needs what not every kernel has:
nftables' queue statement, the bridge family, conntrack attributes, SCTP. See `ci/vm`.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import Hook, NetfilterQueue, Packet
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


@pytest.mark.parametrize("gso", [False, True], ids=["segmented", "gso"])
class TestSctp:
    """It is cut before it is queued, with the flag `gso` as without: the kernel cannot copy what
    SCTP sends at once, as each of its packets has a buffer of its own."""

    @pytest.fixture
    def sizes(
        self, queue: NetfilterQueue, queue_num: int, rules: Callable[..., Rule], gso: bool
    ) -> list[int]:
        """Those of all packets that are queued, and accepted."""

        def accept(packet: Packet) -> None:
            sizes.append(len(packet))
            assert not packet.gso
            assert packet.get_payload()[9] == socket.IPPROTO_SCTP
            packet.accept()

        sizes: list[int] = []
        for chain in ("FORWARD", "OUTPUT"):
            rules(chain, "-p", "sctp", queue=queue_num)
        queue.bind(queue_num, accept, gso=gso, max_len=4096, sock_len=RECEIVE_BUFFER)
        return sizes

    @pytest.fixture
    def data(self) -> bytes:
        return random.Random(0).randbytes(300_000)

    def test_packets_that_were_sent_as_one_are_queued_one_by_one(
        self,
        queue: NetfilterQueue,
        sizes: list[int],
        traffic: Traffic,
        router: Node,
        data: bytes,
    ) -> None:
        tap = router.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        with tap:
            tap.bind((router.interfaces[0], 0))
            transfer = traffic.sctp("forward", data)
            run_until(queue, lambda: transfer.done)
            assert transfer.result() == data
            came = lengths_of(tap)
        assert max(came) > 1500
        assert max(sizes) == 1500
        assert sum(sizes) > len(data)

    @pytest.mark.parametrize("path", ["loopback", "output"])
    def test_all_arrives(
        self, queue: NetfilterQueue, sizes: list[int], traffic: Traffic, data: bytes, path: str
    ) -> None:
        transfer = traffic.sctp(path, data)
        run_until(queue, lambda: transfer.done)
        assert transfer.result() == data
        assert sum(sizes) > len(data)


ETH_P_ALL = 3  # <linux/if_ether.h>


def lengths_of(tap: socket.socket) -> list[int]:
    """Those of the packets that a packet socket has seen."""
    lengths = []
    with suppress(BlockingIOError):
        while True:
            lengths.append(tap.recv_into(bytearray(1), 0, socket.MSG_TRUNC | socket.MSG_DONTWAIT))
    return lengths


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


class TestReceivedTogether:
    @pytest.mark.parametrize("gso", [False, True], ids=["segmented", "gso"])
    def test_datagrams_stay_apart_and_belong_to_a_connection(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        nft: Callable[..., None],
        traffic: Traffic,
        router: Node,
        hosts: tuple[Node, Node],
        gso: bool,
    ) -> None:
        """The router's interface puts them into one packet, a list, as it receives them (GRO)."""
        packets: list[Packet] = []
        arrived: list[bytes] = []

        def accept(packet: Packet) -> None:
            packet.retain()
            packets.append(packet)
            packet.accept()

        def all_arrived() -> bool:
            arrived.extend(flow.arrived())
            return len(arrived) == 20

        flow = traffic.udp("forward")
        flow.sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        queue.bind(queue_num, accept, gso=gso, conntrack=True, sock_len=RECEIVE_BUFFER)
        nft(
            "chain forward { type filter hook forward priority filter;"
            f" ct state new,established meta l4proto udp queue to {queue_num}; }}"
        )
        datagrams = [bytes([number]) * 1000 for number in range(20)]
        with ExitStack() as features:
            for node, interface, name, value in (
                (hosts[0], "eth0", "tx-udp-segmentation", "off"),
                (router, "left", "generic-receive-offload", "on"),
                (router, "left", "rx-gro-list", "on"),
            ):
                features.enter_context(feature(node, interface, name, value))
            flow.send(b"".join(datagrams))
            run_until(queue, all_arrived)
        assert arrived == datagrams
        connections = [packet.conntrack for packet in packets]
        assert None not in connections
        assert {one.original.destination_port for one in connections if one} == {flow.port}
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

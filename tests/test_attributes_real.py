"""Attributes of real packets: interfaces by name, senders, priorities, checksums."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from netfilterqueue import NetfilterQueue, Packet
from support import (
    LEFT_MAC,
    RECEIVE_BUFFER,
    RIGHT_MAC,
    TIMEOUT,
    Route,
    internet_checksum,
    run_until,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.testing import Node
    from support import QueuedUdp, Traffic, UdpFlow

NETLINK_NETFILTER = 12


def names(packet: Packet) -> tuple[str | None, ...]:
    return (
        packet.indev_name,
        packet.outdev_name,
        packet.physindev_name,
        packet.physoutdev_name,
    )


# How a queue comes to be one of a namespace: of the router, where this process is, or a host.
OPENED: dict[str, Callable[[Node, contextlib.ExitStack], NetfilterQueue]] = {
    "here": lambda node, stack: NetfilterQueue(),
    "netns": lambda node, stack: NetfilterQueue(netns=node.pid),
    "sockfd": lambda node, stack: NetfilterQueue(sockfd=netlink_socket(node, stack)),
}


def netlink_socket(node: Node, stack: contextlib.ExitStack) -> int:
    opened = node.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    return stack.enter_context(opened).fileno()


class Outlook(NamedTuple):
    """A queue, and a namespace that it belongs to."""

    node: Node
    queue: NetfilterQueue


@pytest.fixture(params=OPENED)
def outlook(
    request: pytest.FixtureRequest, router: Node, hosts: tuple[Node, Node]
) -> Iterator[Outlook]:
    with contextlib.ExitStack() as stack:
        node = router if request.param == "here" else hosts[0]
        yield Outlook(node, stack.enter_context(OPENED[request.param](node, stack)))


@pytest.fixture
def device(outlook: Outlook) -> Iterator[str]:
    """An interface to which 203.0.113.0/24 is routed, and that can be renamed."""
    ip(outlook.node, "link add before type bridge")
    ip(outlook.node, "address add 203.0.113.1/24 dev before")
    ip(outlook.node, "link set before up")
    yield "before"
    # A test may have renamed or deleted it.
    for name in ("before", "after"):
        with contextlib.suppress(subprocess.CalledProcessError):
            ip(outlook.node, f"link delete {name}")


def ip(node: Node, command: str) -> None:
    node.run(["ip", *command.split()])


class TestInterfaceNames:
    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("loopback", ("lo", None, None, None)),
            ("input", ("left", None, None, None)),
            ("forward", ("left", "right", None, None)),
            ("output", (None, "right", None, None)),
        ],
    )
    @pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
    def test_they_are_those_of_the_indexes(
        self,
        queued_udp: Callable[..., QueuedUdp],
        path: str,
        expected: tuple[str | None, ...],
        ipv6: bool,
    ) -> None:
        packet = queued_udp(path, ipv6=ipv6).deliver_one()
        assert names(packet) == expected
        assert packet.indev == (socket.if_nametoindex(expected[0]) if expected[0] else 0)
        assert packet.outdev == (socket.if_nametoindex(expected[1]) if expected[1] else 0)
        packet.drop()

    def test_they_are_those_of_the_queues_namespace_and_follow_a_change_of_name(
        self, outlook: Outlook, device: str, queue_num: int
    ) -> None:
        node, queue = outlook
        seen: list[Packet] = []
        queue.bind(queue_num, seen.append, sock_len=RECEIVE_BUFFER)
        with node.rule("OUTPUT", "-d", "203.0.113.2", queue=queue_num):
            with node.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"hello", ("203.0.113.2", 9))
            run_until(queue, lambda: seen)
        packet = seen.pop()
        packet.drop()
        assert packet.outdev_name == device
        ip(node, f"link set {device} down")
        ip(node, f"link set {device} name after")
        assert packet.outdev_name == "after"
        queue.unbind()
        assert packet.outdev_name == "after"
        ip(node, "link delete after")
        assert packet.outdev_name is None
        assert packet.outdev > 0

    def test_the_same_index_is_another_interface_elsewhere(
        self, hosts: tuple[Node, Node], queue_num: int, traffic: Traffic
    ) -> None:
        left = hosts[0]
        seen: list[Packet] = []
        flow = traffic.udp("input")
        match = ("-p", "udp", "--dport", flow.port)
        with NetfilterQueue(netns=left.pid) as queue, left.rule("OUTPUT", *match, queue=queue_num):
            queue.bind(queue_num, seen.append, sock_len=RECEIVE_BUFFER)
            flow.send(b"hello")
            run_until(queue, lambda: seen)
            assert seen[0].outdev_name == "eth0"
            assert socket.if_indextoname(seen[0].outdev) != "eth0"
            seen.pop().drop()

    def test_they_are_none_once_the_queue_is_closed(
        self, queued: Callable[..., UdpFlow], queue_num: int
    ) -> None:
        seen: list[Packet] = []
        flow = queued()
        with NetfilterQueue() as queue:
            queue.bind(queue_num, seen.append, sock_len=RECEIVE_BUFFER)
            flow.send(b"hello")
            run_until(queue, lambda: seen)
            assert names(seen[0])[0] == "lo"
        assert names(seen[0]) == (None, None, None, None)
        assert seen[0].indev == 1

    def test_descriptor_that_somebody_closed_is_an_error(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp()
        packet = udp.deliver_one()
        packet.drop()
        spare = os.dup(udp.queue.fileno())
        os.close(udp.queue.fileno())
        try:
            with pytest.raises(OSError, match="cannot look up interface 1: Bad file descriptor"):
                packet.indev_name  # noqa: B018 - it raises
        finally:
            os.dup2(spare, udp.queue.fileno(), inheritable=False)
            os.close(spare)

    @pytest.mark.stock_kernel(only=False)
    def test_bridged_packet_has_those_of_its_ports(
        self,
        hosts: tuple[Node, Node],
        queue: NetfilterQueue,
        queue_num: int,
        rules: Callable[..., object],
        traffic: Traffic,
        bridged_hosts: tuple[str, str],
    ) -> None:
        seen: list[Packet] = []
        calls = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
        if not calls.exists():
            pytest.skip("this kernel shows iptables no bridged packets (br_netfilter)")
        calls.write_text("1")
        rules("FORWARD", "-p", "udp", queue=queue_num)
        queue.bind(queue_num, seen.append, sock_len=RECEIVE_BUFFER)
        flow = traffic.udp_over(Route(*hosts, bridged_hosts[1], socket.AF_INET))
        flow.send(b"hello")
        run_until(queue, lambda: seen)
        packet = seen.pop()
        assert names(packet) == ("bridge0", "bridge0", "port0", "port1")
        indexes = [packet.indev, packet.outdev, packet.physindev, packet.physoutdev]
        assert indexes == [socket.if_nametoindex(name) for name in names(packet) if name]
        # The queue is not one of the bridge family.
        assert packet.l2_header is None
        packet.accept()
        assert flow.receive() == b"hello"


def real_user(path: str) -> int:
    """The number of this process's user, or group, outside its user namespace."""
    inside, outside, _ = map(int, Path(path).read_text(encoding="ascii").split())
    assert inside == 0
    return outside


class TestSender:
    def test_it_is_named_by_user_and_group(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        packet = queued_udp("output", uid_gid=True).deliver_one()
        expected = real_user("/proc/self/uid_map"), real_user("/proc/self/gid_map")
        assert (packet.uid, packet.gid) == expected
        packet.drop()
        assert (packet.uid, packet.gid) == expected

    @pytest.mark.real_root
    def test_another_user_is_told_from_root(
        self, router: Node, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp("loopback", chain="OUTPUT", uid_gid=True)
        program = "import os, socket, sys; os.setgid(6543); os.setuid(1234)\n"
        program += "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
        program += ".sendto(b'hello', ('127.0.0.1', int(sys.argv[1])))"
        router.run([sys.executable, "-c", program, str(udp.flow.port)])
        run_until(udp.queue, lambda: udp.packets)
        assert (udp.packets[0].uid, udp.packets[0].gid) == (1234, 6543)
        udp.packets.pop().drop()

    def test_it_is_unknown_where_nobody_asked(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        packet = queued_udp("output").deliver_one()
        assert (packet.uid, packet.gid) == (None, None)
        packet.drop()

    def test_it_is_unknown_of_another_host(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        packet = queued_udp("forward", uid_gid=True).deliver_one()
        assert (packet.uid, packet.gid) == (None, None)
        packet.drop()


class TestPriority:
    @pytest.mark.parametrize("priority", [0, 1, 6, 0x10002])
    def test_it_is_the_sockets(self, queued_udp: Callable[..., QueuedUdp], priority: int) -> None:
        udp = queued_udp("output")
        udp.flow.sender.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
        packet = udp.deliver_one()
        assert packet.priority == priority
        packet.drop()

    def test_it_is_what_a_rule_has_set(
        self, queued_udp: Callable[..., QueuedUdp], rules: Callable[..., object]
    ) -> None:
        udp = queued_udp("forward")
        classify = ("-j", "CLASSIFY", "--set-class", "7:ffff")
        rules("FORWARD", "-p", "udp", *classify, table="mangle")
        packet = udp.deliver_one()
        assert packet.priority == 0x0007FFFF
        packet.drop()


@pytest.mark.real_root
def test_class_is_that_of_the_senders_control_group(
    router: Node, queued_udp: Callable[..., QueuedUdp], tmp_path: Path
) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "cgroup", "-o", "net_cls", "none", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no control groups with classes: {mounted.stderr.strip()}")
    group = tmp_path / "netfilterqueue-test"
    try:
        group.mkdir()
        (group / "net_cls.classid").write_text("0x00100001")
        udp = queued_udp("output")
        assert udp.deliver_one().cgroup_classid == 0
        program = "import os, socket, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        program += "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
        program += ".sendto(b'hello', (sys.argv[2], int(sys.argv[3])))"
        address = udp.flow.receiver.getsockname()
        arguments = [str(group / "cgroup.procs"), *map(str, address)]
        router.run([sys.executable, "-c", program, *arguments])
        run_until(udp.queue, lambda: len(udp.packets) == 2)
        assert udp.packets[1].cgroup_classid == 0x00100001
        for packet in udp.packets:
            packet.drop()
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()
        subprocess.run(["umount", str(tmp_path)], check=True)


class TestChecksums:
    def test_that_of_a_local_packet_is_ready_unless_the_queue_takes_it_as_it_is(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp("output")
        assert udp.deliver_one().checksum_ready
        udp.queue.unbind()
        udp.queue.bind(
            udp.packets[0].queue_num, udp.packets.append, sock_len=RECEIVE_BUFFER, gso=True
        )
        packet = udp.deliver_one()
        # The pseudo-header's sum is in its place.
        assert not packet.checksum_ready
        assert packet.checksum_verified
        packet.drop()

    def test_nobody_has_verified_that_of_a_packet_from_elsewhere(
        self,
        traffic: Traffic,
        queue: NetfilterQueue,
        queue_num: int,
        rules: Callable[..., object],
    ) -> None:
        seen: list[Packet] = []
        rules("FORWARD", "-p", "icmp", "--icmp-type", "echo-request", queue=queue_num)
        queue.bind(queue_num, seen.append, sock_len=RECEIVE_BUFFER)
        traffic.ping("forward").send(b"ping")
        run_until(queue, lambda: seen)
        assert seen[0].checksum_ready
        assert not seen[0].checksum_verified
        assert not seen[0].gso
        seen.pop().drop()


@pytest.mark.stock_kernel
class TestBridgeFamily:
    @pytest.fixture
    def send(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        nft: Callable[..., None],
        hosts: tuple[Node, Node],
        bridged_hosts: tuple[str, str],
    ) -> Callable[..., list[bytes]]:
        """Send a datagram over the bridge, past a callback; return frames that came out of it."""
        nft(
            # At 0 and above, br_netfilter takes the packets out of the bridge's chains.
            "chain c { type filter hook forward priority filter;"
            f" ether type {{ ip, vlan }} queue to {queue_num}; }}",
            family="bridge",
        )

        def sent(decide: Callable[[Packet], object], *, vlan: bool = False) -> list[bytes]:
            packets: list[Packet] = []

            def keep(packet: Packet) -> None:
                packets.append(packet)
                decide(packet)

            queue.bind(queue_num, keep, sock_len=RECEIVE_BUFFER)
            receiver = hosts[1].socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            sender = hosts[0].socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            with receiver, sender:
                receiver.bind(("bridged", 0))
                receiver.settimeout(TIMEOUT)
                # Option 8 of SOL_PACKET is PACKET_AUXDATA: the tag is not in the frame.
                receiver.setsockopt(263, 8, 1)
                sender.bind(("bridged", 0))
                sender.send(frame(0x8100 if vlan else 0x0800))
                run_until(queue, lambda: packets)
                while True:
                    received, auxiliary, _, _ = receiver.recvmsg(2048, 1024)
                    if received.endswith(MARKER):
                        break
            queue.unbind()
            return [received, *(data for _, _, data in auxiliary)]

        return sent

    def test_header_is_there_and_can_be_changed(
        self, send: Callable[..., list[bytes]], queue_num: int
    ) -> None:
        seen: list[Packet] = []

        def change(packet: Packet) -> None:
            seen.append(packet)
            packet.set_l2_header(RIGHT_MAC + NEW_SOURCE + b"\x08\0")
            packet.accept()

        received = send(change)
        assert seen[0].l2_header == RIGHT_MAC + LEFT_MAC + b"\x08\0"
        assert seen[0].vlan is None
        assert names(seen[0]) == ("bridge0", "bridge0", "port0", "port1")
        assert received[0][:14] == RIGHT_MAC + NEW_SOURCE + b"\x08\0"

    def test_tag_is_there_and_can_be_changed(self, send: Callable[..., list[bytes]]) -> None:
        seen: list[Packet] = []

        def change(packet: Packet) -> None:
            seen.append(packet)
            packet.set_vlan(0x8100, 0x2ABC)
            packet.accept()

        received = send(change, vlan=True)
        assert seen[0].vlan == (0x8100, 0x6005)
        assert struct.unpack("=IIIHHHH", received[1])[5:] == (0x2ABC, 0x8100)


NEW_SOURCE = b"\2\0\0\0\0\x13"
MARKER = b"over the bridge"


def frame(protocol: int) -> bytes:
    """An IPv4 packet from the left to the right host; with 0x8100, in VLAN 5 with priority 3."""
    tag = b"\x60\5\x08\0" if protocol == 0x8100 else b""
    start = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(MARKER), 0, 0, 64, 253)
    addresses = b"\n\0\0\1\n\0\0\2"
    # br_netfilter drops packets with a wrong one.
    checksum = struct.pack("!H", internet_checksum(start + addresses))
    header = start + checksum + addresses
    return RIGHT_MAC + LEFT_MAC + struct.pack("!H", protocol) + tag + header + MARKER

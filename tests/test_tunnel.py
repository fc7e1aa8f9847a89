"""Packets in packets: a tunnel over UDP, into which the router leaves checksums unfinished."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from support import RECEIVE_BUFFER, Route, run_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue import NetfilterQueue, Packet
    from netfilterqueue.testing import Node, Rule
    from support import Traffic, UdpFlow

PORT = 4789  # of VXLAN (RFC 7348)


@pytest.fixture(params=["noudpcsum", "udpcsum"], ids=["no outer checksum", "outer checksum"])
def flow(
    request: pytest.FixtureRequest, router: Node, hosts: tuple[Node, Node], traffic: Traffic
) -> Iterator[UdpFlow]:
    """Datagrams from the router to the right host, in a tunnel."""
    addresses = {router: "203.0.113.1", hosts[1]: "203.0.113.2"}
    devices = {router: router.interfaces[1], hosts[1]: hosts[1].interfaces[0]}
    for node, other in ((router, hosts[1]), (hosts[1], router)):
        ends = ["dev", devices[node], "remote", other.ipv4, "dstport", str(PORT), request.param]
        command = ["ip", "link", "add", "tunnel", "type", "vxlan", "id", "5", *ends]
        if node.run(command, check=False).returncode:
            pytest.skip("this kernel has no VXLAN devices")
        node.run(["ip", "address", "add", f"{addresses[node]}/24", "dev", "tunnel"])
        node.run(["ip", "link", "set", "tunnel", "up"])
    yield traffic.udp_over(Route(router, hosts[1], addresses[hosts[1]], socket.AF_INET))
    for node in addresses:
        node.run(["ip", "link", "delete", "tunnel"])


@pytest.mark.stock_kernel(only=False)
@pytest.mark.parametrize("gso", [False, True])
def test_checksum_inside_is_never_left_unfinished(
    queue: NetfilterQueue,
    queue_num: int,
    rules: Callable[..., Rule],
    flow: UdpFlow,
    gso: bool,
) -> None:
    """Each packet gets a new time to live, but goes on as it came where that is refused."""

    def callback(packet: Packet) -> None:
        payload = bytearray(packet.get_payload())
        payload[8] -= 1
        carries_udp = payload.endswith(b"hello")
        # Without the flag, the kernel has finished it. ARP has none.
        if gso and carries_udp:
            with pytest.raises(ValueError, match=r"packet inside of it, as in a tunnel: bind with"):
                packet.set_payload(payload, checksums=True)
        else:
            packet.set_payload(payload, checksums=True)
        packet.accept()
        if carries_udp:
            ready.append(packet.checksum_ready)

    ready: list[bool] = []
    rules("OUTPUT", "-p", "udp", "--dport", PORT, queue=queue_num)
    queue.bind(queue_num, callback, gso=gso, sock_len=RECEIVE_BUFFER)
    flow.send(b"hello")
    run_until(queue, lambda: ready)
    assert flow.receive() == b"hello"
    assert ready == [not gso]

"""For people who test their own filters.

`packet` makes a real `Packet` for a callback, without a kernel:

    def test_pings_are_dropped():
        ping = packet(bytes(IP(dst="192.0.2.1") / ICMP()))
        my_callback(ping)
        assert ping.verdict is Verdict.DROP

`Sandbox` is a private network, made without root, in which a filter meets real packets. A pytest
plugin, installed with this package, gives each test a fresh one as the fixture `nfqueue_sandbox`:

    def test_pings_pass(nfqueue_sandbox):
        left, right = nfqueue_sandbox.hosts
        with nfqueue_sandbox.router.rule("FORWARD", "-p", "icmp", queue=1):
            filter = nfqueue_sandbox.router.popen([sys.executable, "my_filter.py"])
            ...
            left.run(["ping", "-c", "1", right.ipv4])
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from ._arguments import MAX_UINT32, integer, seconds
from ._packet import packets_from
from ._sandbox import CommandFailed, Node, Rule, Sandbox, SandboxUnavailable
from .constants import Hook

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from . import Packet

__all__ = ["CommandFailed", "Node", "Rule", "Sandbox", "SandboxUnavailable", "packet"]

# Message and attribute types, of <linux/netfilter/nfnetlink.h> and .../nfnetlink_queue.h.
PACKET_MESSAGE = 3 << 8 | 0  # NFNL_SUBSYS_QUEUE, NFQNL_MSG_PACKET
NFQA_PACKET_HDR = 1
NFQA_MARK = 3
NFQA_TIMESTAMP = 4
NFQA_IFINDEX_INDEV = 5
NFQA_IFINDEX_OUTDEV = 6
NFQA_IFINDEX_PHYSINDEV = 7
NFQA_IFINDEX_PHYSOUTDEV = 8
NFQA_HWADDR = 9
NFQA_PAYLOAD = 10

MAX_PAYLOAD = 65531
MAX_HW = 8
MAX_TIMESTAMP = 253402300799.0  # the last second of the year 9999, where datetime ends
# By IP version, the upper half of an IP packet's first byte.
HW_PROTOCOLS = {4: 0x0800, 6: 0x86DD}


def packet(
    payload: Buffer | None,
    *,
    hook: int = Hook.INPUT,
    mark: int = 0,
    indev: int = 0,
    outdev: int = 0,
    physindev: int = 0,
    physoutdev: int = 0,
    hw_protocol: int | None = None,
    hw: Buffer | None = None,
    timestamp: float = 0.0,
    queue_num: int = 0,
    id: int = 1,
) -> Packet:
    """A real `Packet` that belongs to no kernel queue, for tests of a callback.

    Decide it, then look at `packet.verdict`, `packet.get_payload()` and `packet.get_mark()`. Its
    payload stays readable after the callback, as if it had been retained.

    The arguments are what the packet's attributes and methods will say. `payload` starts with the
    network header and has 1 to 65531 bytes; None makes a packet of COPY_META mode. `hw` is a
    hardware address of 1 to 8 bytes, None where there is none. `timestamp` is in seconds since the
    epoch. `hw_protocol` defaults to that of the payload's IP version, and to 0 if it has none.

    Raises TypeError and ValueError for what no packet can have.
    """
    content = b"" if payload is None else some_bytes("payload", payload, MAX_PAYLOAD)
    address = b"" if hw is None else some_bytes("hw", hw, MAX_HW)
    if hw_protocol is None:
        hw_protocol = HW_PROTOCOLS.get(content[0] >> 4, 0) if content else 0
    header = struct.pack(
        "!IHB",
        integer("id", id, 0, MAX_UINT32),
        integer("hw_protocol", hw_protocol, 0, 0xFFFF),
        integer("hook", hook, Hook.PREROUTING, Hook.POSTROUTING),
    )
    numbers = {
        NFQA_MARK: integer("mark", mark, 0, MAX_UINT32),
        NFQA_IFINDEX_INDEV: integer("indev", indev, 0, MAX_UINT32),
        NFQA_IFINDEX_OUTDEV: integer("outdev", outdev, 0, MAX_UINT32),
        NFQA_IFINDEX_PHYSINDEV: integer("physindev", physindev, 0, MAX_UINT32),
        NFQA_IFINDEX_PHYSOUTDEV: integer("physoutdev", physoutdev, 0, MAX_UINT32),
    }
    microseconds = round(seconds("timestamp", timestamp, MAX_TIMESTAMP) * 1_000_000)
    # Like the kernel, this tells what there is and leaves out the rest, and the payload comes last.
    attributes = [attribute(NFQA_PACKET_HDR, header)]
    attributes += [attribute(kind, struct.pack("!I", n)) for kind, n in numbers.items() if n]
    if microseconds:
        stamp = struct.pack("!QQ", *divmod(microseconds, 1_000_000))
        attributes.append(attribute(NFQA_TIMESTAMP, stamp))
    if address:
        attributes.append(attribute(NFQA_HWADDR, struct.pack("!Hxx8s", len(address), address)))
    if content:
        attributes.append(attribute(NFQA_PAYLOAD, content))
    number = integer("queue_num", queue_num, 0, 0xFFFF)
    packets: list[Packet]
    packets, _ = packets_from([packet_message(number, b"".join(attributes))])
    return packets[0]


def some_bytes(name: str, value: Buffer, longest: int) -> bytes:
    try:
        content = bytes(memoryview(value))
    except TypeError:
        raise TypeError(f"{name} must be bytes-like, not {type(value).__name__}") from None
    if not 1 <= len(content) <= longest:
        raise ValueError(
            f"{name} has {len(content)} bytes, but must have 1 to {longest}, or be None"
        )
    return content


def attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def packet_message(queue_num: int, attributes: bytes) -> bytes:
    family_header = struct.pack("!BBH", socket.AF_UNSPEC, 0, queue_num)
    length = 16 + len(family_header) + len(attributes)
    return struct.pack("=IHHII", length, PACKET_MESSAGE, 0, 0, 0) + family_header + attributes

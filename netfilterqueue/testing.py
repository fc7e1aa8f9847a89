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

import os
import socket
import struct
from typing import TYPE_CHECKING

from ._arguments import MAX_UINT32, integer, seconds
from ._handmade import packets_from
from ._sandbox import CommandFailed, Node, Rule, Sandbox, SandboxUnavailable
from .conntrack import attribute, encode
from .constants import Hook
from .vlan import Vlan

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from . import Packet
    from .conntrack import Conntrack

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
NFQA_CT = 11
NFQA_CT_INFO = 12
NFQA_CAP_LEN = 13
NFQA_SKB_INFO = 14
NFQA_UID = 16
NFQA_GID = 17
NFQA_SECCTX = 18
NFQA_VLAN = 19
NFQA_L2HDR = 20
NFQA_PRIORITY = 21
NFQA_CGROUP_CLASSID = 22
NFQA_VLAN_PROTO = 1
NFQA_VLAN_TCI = 2
# Bits of NFQA_SKB_INFO.
NFQA_SKB_CSUMNOTREADY = 1
NFQA_SKB_GSO = 2
NFQA_SKB_CSUM_NOTVERIFIED = 4

MAX_PAYLOAD = 65531
MAX_HW = 8
MAX_ATTRIBUTE = 65531
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
    indev_name: str | None = None,
    outdev_name: str | None = None,
    physindev_name: str | None = None,
    physoutdev_name: str | None = None,
    uid: int | None = None,
    gid: int | None = None,
    secctx: str | None = None,
    conntrack: Conntrack | None = None,
    vlan: tuple[int, int] | None = None,
    l2_header: Buffer | None = None,
    priority: int = 0,
    cgroup_classid: int = 0,
    original_len: int | None = None,
    checksum_ready: bool = True,
    checksum_verified: bool = True,
    gso: bool = False,
) -> Packet:
    """A real `Packet` that belongs to no kernel queue, for tests of a callback.

    Decide it, then look at `packet.verdict`, `packet.get_payload()` and `packet.get_mark()`. Its
    payload stays readable after the callback, as if it had been retained.

    The arguments are what the packet's attributes and methods will say. `payload` starts with the
    network header and has 1 to 65531 bytes; None makes a packet of COPY_META mode. `hw` is a
    hardware address of 1 to 8 bytes, None where there is none. `timestamp` is in seconds since the
    epoch. `hw_protocol` defaults to that of the payload's IP version, and to 0 if it has none. An
    interface that has a name and no index gets one. With `original_len` above the payload's length,
    the packet is truncated. With `vlan` or `l2_header`, it is one of the bridge family.

    Raises TypeError and ValueError for what no packet can have.
    """
    content = b"" if payload is None else some_bytes("payload", payload, MAX_PAYLOAD)
    if hw_protocol is None:
        hw_protocol = HW_PROTOCOLS.get(content[0] >> 4, 0) if content else 0
    names: dict[int, str] = {}
    # Like the kernel, this tells what there is and leaves out the rest, and the payload comes last.
    attributes = [
        packet_header(id, hw_protocol, hook),
        number(NFQA_MARK, "mark", mark),
        number(NFQA_IFINDEX_INDEV, "indev", named(names, indev, indev_name)),
        number(NFQA_IFINDEX_OUTDEV, "outdev", named(names, outdev, outdev_name)),
        number(NFQA_IFINDEX_PHYSINDEV, "physindev", named(names, physindev, physindev_name)),
        number(NFQA_IFINDEX_PHYSOUTDEV, "physoutdev", named(names, physoutdev, physoutdev_name)),
        number(NFQA_PRIORITY, "priority", priority),
        number(NFQA_CGROUP_CLASSID, "cgroup_classid", cgroup_classid),
        number(NFQA_UID, "uid", uid),
        number(NFQA_GID, "gid", gid),
        number(NFQA_CAP_LEN, "original_len", original_len),
        skb_info(checksum_ready, checksum_verified, gso),
        time_stamp(timestamp),
        hardware_address(hw),
        security_context(secctx),
        vlan_tag(vlan),
        connection(conntrack),
    ]
    if l2_header is not None:
        header = some_bytes("l2_header", l2_header, MAX_ATTRIBUTE)
        attributes.append(attribute(NFQA_L2HDR, header))
    if content:
        attributes.append(attribute(NFQA_PAYLOAD, content))
    bridged = vlan is not None or l2_header is not None
    queue_number = integer("queue_num", queue_num, 0, 0xFFFF)
    message = packet_message(queue_number, b"".join(attributes), bridged)
    packets: list[Packet]
    packets, _ = packets_from([message], interfaces=names)
    return packets[0]


def packet_header(id: int, hw_protocol: int, hook: int) -> bytes:
    header = struct.pack(
        "!IHB",
        integer("id", id, 0, MAX_UINT32),
        integer("hw_protocol", hw_protocol, 0, 0xFFFF),
        integer("hook", hook, Hook.PREROUTING, Hook.POSTROUTING),
    )
    return attribute(NFQA_PACKET_HDR, header)


def number(kind: int, name: str, value: int | None) -> bytes:
    if value is None:
        return b""
    checked = integer(name, value, 0, MAX_UINT32)
    # Zero is a user and a group; of the others, the kernel does not send it.
    if not checked and kind not in {NFQA_UID, NFQA_GID}:
        return b""
    return attribute(kind, struct.pack("!I", checked))


def named(names: dict[int, str], index: int, name: str | None) -> int:
    """The interface's index; with a name it becomes known by it, and gets one if it has none."""
    if name is not None:
        index = index or max(names, default=0) + 1
        names[index] = name
    return index


def skb_info(checksum_ready: bool, checksum_verified: bool, gso: bool) -> bytes:
    bits = 0 if checksum_ready else NFQA_SKB_CSUMNOTREADY
    bits |= 0 if checksum_verified else NFQA_SKB_CSUM_NOTVERIFIED
    bits |= NFQA_SKB_GSO if gso else 0
    return number(NFQA_SKB_INFO, "skb_info", bits)


def time_stamp(timestamp: float) -> bytes:
    microseconds = round(seconds("timestamp", timestamp, MAX_TIMESTAMP) * 1_000_000)
    if not microseconds:
        return b""
    return attribute(NFQA_TIMESTAMP, struct.pack("!QQ", *divmod(microseconds, 1_000_000)))


def hardware_address(hw: Buffer | None) -> bytes:
    if hw is None:
        return b""
    address = some_bytes("hw", hw, MAX_HW)
    return attribute(NFQA_HWADDR, struct.pack("!Hxx8s", len(address), address))


def security_context(secctx: str | None) -> bytes:
    if secctx is None:
        return b""
    if not isinstance(secctx, str):
        raise TypeError(f"secctx must be a str, not {type(secctx).__name__}")
    # As the kernel has it, with a zero at its end.
    return attribute(NFQA_SECCTX, some_bytes("secctx", os.fsencode(secctx) + b"\0", MAX_ATTRIBUTE))


def vlan_tag(vlan: tuple[int, int] | None) -> bytes:
    if vlan is None:
        return b""
    tag = Vlan(*vlan)
    proto = struct.pack("!H", integer("vlan.proto", tag.proto, 0, 0xFFFF))
    tci = struct.pack("!H", integer("vlan.tci", tag.tci, 0, 0xFFFF))
    return attribute(NFQA_VLAN, attribute(NFQA_VLAN_PROTO, proto) + attribute(NFQA_VLAN_TCI, tci))


def connection(conntrack: Conntrack | None) -> bytes:
    if conntrack is None:
        return b""
    content = attribute(NFQA_CT, encode(conntrack))
    if conntrack.state is not None:
        content += attribute(NFQA_CT_INFO, struct.pack("!I", conntrack.state.value))
    return content


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


def packet_message(queue_num: int, attributes: bytes, bridged: bool) -> bytes:
    family = socket.AF_BRIDGE if bridged else socket.AF_UNSPEC
    family_header = struct.pack("!BBH", family, 0, queue_num)
    length = 16 + len(family_header) + len(attributes)
    return struct.pack("=IHHII", length, PACKET_MESSAGE, 0, 0, 0) + family_header + attributes

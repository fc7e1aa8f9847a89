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

from ._arguments import MAX_UINT32, bytes_of, integer, seconds
from ._handmade import packets_from
from ._sandbox import CommandFailed, Node, Rule, Sandbox, SandboxUnavailable
from ._uapi import (
    NFNL_SUBSYS_QUEUE,
    NFQA_CAP_LEN,
    NFQA_CGROUP_CLASSID,
    NFQA_CT,
    NFQA_CT_INFO,
    NFQA_GID,
    NFQA_HWADDR,
    NFQA_IFINDEX_INDEV,
    NFQA_IFINDEX_OUTDEV,
    NFQA_IFINDEX_PHYSINDEV,
    NFQA_IFINDEX_PHYSOUTDEV,
    NFQA_L2HDR,
    NFQA_MARK,
    NFQA_PACKET_HDR,
    NFQA_PAYLOAD,
    NFQA_PRIORITY,
    NFQA_SECCTX,
    NFQA_SKB_CSUM_NOTVERIFIED,
    NFQA_SKB_CSUMNOTREADY,
    NFQA_SKB_GSO,
    NFQA_SKB_INFO,
    NFQA_TIMESTAMP,
    NFQA_UID,
    NFQA_VLAN,
    NFQA_VLAN_PROTO,
    NFQA_VLAN_TCI,
    NFQNL_MSG_PACKET,
)
from .conntrack import attribute, encode
from .constants import Hook
from .vlan import Vlan

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from . import Packet
    from .conntrack import Conntrack

__all__ = ["CommandFailed", "Node", "Rule", "Sandbox", "SandboxUnavailable", "packet"]

# The attributes that are plain numbers, by the names of `packet`'s arguments.
NUMBERS = {
    "mark": NFQA_MARK,
    "indev": NFQA_IFINDEX_INDEV,
    "outdev": NFQA_IFINDEX_OUTDEV,
    "physindev": NFQA_IFINDEX_PHYSINDEV,
    "physoutdev": NFQA_IFINDEX_PHYSOUTDEV,
    "priority": NFQA_PRIORITY,
    "cgroup_classid": NFQA_CGROUP_CLASSID,
    "uid": NFQA_UID,
    "gid": NFQA_GID,
    "original_len": NFQA_CAP_LEN,
    "skb_info": NFQA_SKB_INFO,
}

MAX_HW = 8
MAX_ATTRIBUTE = 65531  # bytes: its length has 16 bits, and counts a header of 4
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
    content = optional_bytes("payload", payload, MAX_ATTRIBUTE)
    if hw_protocol is None:
        hw_protocol = HW_PROTOCOLS.get(content[0] >> 4, 0) if content else 0
    names: dict[int, str] = {}
    # Like the kernel, this tells what there is and leaves out the rest, and the payload comes last.
    attributes = [
        packet_header(id, hw_protocol, hook),
        number("mark", mark),
        number("indev", named(names, indev, indev_name)),
        number("outdev", named(names, outdev, outdev_name)),
        number("physindev", named(names, physindev, physindev_name)),
        number("physoutdev", named(names, physoutdev, physoutdev_name)),
        number("priority", priority),
        number("cgroup_classid", cgroup_classid),
        number("uid", uid),
        number("gid", gid),
        number("original_len", original_len),
        number("skb_info", skb_info(checksum_ready, checksum_verified, gso)),
        time_stamp(timestamp),
        hardware_address(hw),
        security_context(secctx),
        vlan_tag(vlan),
        connection(conntrack),
        some(NFQA_L2HDR, optional_bytes("l2_header", l2_header, MAX_ATTRIBUTE)),
        some(NFQA_PAYLOAD, content),
    ]
    family = socket.AF_UNSPEC if vlan is None and l2_header is None else socket.AF_BRIDGE
    message = packet_message(family, queue_num, b"".join(attributes))
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


def number(name: str, value: int | None) -> bytes:
    if value is None:
        return b""
    checked = integer(name, value, 0, MAX_UINT32)
    # Zero is a user and a group; of the others, the kernel does not send it.
    if not checked and name not in {"uid", "gid"}:
        return b""
    return attribute(NUMBERS[name], struct.pack("!I", checked))


def named(names: dict[int, str], index: int, name: str | None) -> int:
    """The interface's index; with a name it becomes known by it, and gets one if it has none."""
    if name is not None:
        index = index or max(names, default=0) + 1
        names[index] = name
    return index


def skb_info(checksum_ready: bool, checksum_verified: bool, gso: bool) -> int:
    bits: int = 0 if checksum_ready else NFQA_SKB_CSUMNOTREADY
    bits |= 0 if checksum_verified else NFQA_SKB_CSUM_NOTVERIFIED
    bits |= NFQA_SKB_GSO if gso else 0
    return bits


def time_stamp(timestamp: float) -> bytes:
    microseconds = round(seconds("timestamp", timestamp, MAX_TIMESTAMP) * 1_000_000)
    if not microseconds:
        return b""
    return attribute(NFQA_TIMESTAMP, struct.pack("!QQ", *divmod(microseconds, 1_000_000)))


def hardware_address(hw: Buffer | None) -> bytes:
    address = optional_bytes("hw", hw, MAX_HW)
    if not address:
        return b""
    return attribute(NFQA_HWADDR, struct.pack("!Hxx8s", len(address), address))


def security_context(secctx: str | None) -> bytes:
    if secctx is None:
        return b""
    if not isinstance(secctx, str):
        raise TypeError(f"secctx must be a str, not {type(secctx).__name__}")
    # As the kernel has it, with a zero at its end.
    context = os.fsencode(secctx) + b"\0"
    return some(NFQA_SECCTX, optional_bytes("secctx", context, MAX_ATTRIBUTE))


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


def optional_bytes(name: str, value: Buffer | None, longest: int) -> bytes:
    """The value, 1 to so many bytes; empty for None."""
    if value is None:
        return b""
    content = bytes_of(name, value)
    if not 1 <= len(content) <= longest:
        raise ValueError(
            f"{name} has {len(content)} bytes, but must have 1 to {longest}, or be None"
        )
    return content


def some(kind: int, value: bytes) -> bytes:
    """An attribute, where it has a value."""
    return attribute(kind, value) if value else b""


def packet_message(family: int, queue_num: int, attributes: bytes) -> bytes:
    number = integer("queue_num", queue_num, 0, 0xFFFF)
    content = struct.pack("!BBH", family, 0, number) + attributes
    kind = NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_PACKET
    return struct.pack("=IHHII", 16 + len(content), kind, 0, 0, 0) + content

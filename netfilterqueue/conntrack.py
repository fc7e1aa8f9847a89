"""The connection that a packet belongs to, as connection tracking knows it.

With the flag CONNTRACK the kernel puts it beside the packet, in the attributes of
``<linux/netfilter/nfnetlink_conntrack.h>``; integers are big endian. It is decoded when somebody
asks. What is short, long or unknown counts as absent.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from enum import Enum, IntFlag
from typing import TYPE_CHECKING

from netfilterqueue._uapi import (
    CTA_ID,
    CTA_IP_V4_DST,
    CTA_IP_V4_SRC,
    CTA_IP_V6_DST,
    CTA_IP_V6_SRC,
    CTA_LABELS,
    CTA_MARK,
    CTA_PROTO_DST_PORT,
    CTA_PROTO_ICMP_CODE,
    CTA_PROTO_ICMP_ID,
    CTA_PROTO_ICMP_TYPE,
    CTA_PROTO_ICMPV6_CODE,
    CTA_PROTO_ICMPV6_ID,
    CTA_PROTO_ICMPV6_TYPE,
    CTA_PROTO_NUM,
    CTA_PROTO_SRC_PORT,
    CTA_STATUS,
    CTA_TIMEOUT,
    CTA_TUPLE_IP,
    CTA_TUPLE_ORIG,
    CTA_TUPLE_PROTO,
    CTA_TUPLE_REPLY,
    CTA_TUPLE_ZONE,
    CTA_ZONE,
    NLA_F_NESTED,
    NLA_TYPE_MASK,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Conntrack", "ConntrackState", "ConntrackStatus", "ConntrackTuple"]

HEADER = struct.Struct("=HH")  # of an attribute: its length with this header, its type
LABELS_SIZE = 16  # bytes

Attributes = dict[int, bytes]


class ConntrackState(Enum):
    """What a packet is to its connection (``enum ip_conntrack_info``)."""

    #: It goes the way of the first packet, and the other side has answered.
    ESTABLISHED = 0
    #: It begins a connection that belongs to another one, or is an ICMP error about it.
    RELATED = 1
    #: It begins a connection, or nobody has answered it yet.
    NEW = 2
    #: It goes the other way.
    ESTABLISHED_REPLY = 3
    #: It is an ICMP error about a connection, and goes the other way.
    RELATED_REPLY = 4


class ConntrackStatus(IntFlag):
    """What has become of a connection (``enum ip_conntrack_status``)."""

    #: Another connection has announced it.
    EXPECTED = 1 << 0
    #: Packets have been seen both ways.
    SEEN_REPLY = 1 << 1
    #: It is not given up early when the table is full.
    ASSURED = 1 << 2
    #: Its first packet has left the host, or has reached its socket.
    CONFIRMED = 1 << 3
    #: Its source address is translated.
    SRC_NAT = 1 << 4
    #: Its destination address is translated.
    DST_NAT = 1 << 5
    #: TCP sequence numbers are adjusted.
    SEQ_ADJUST = 1 << 6
    #: It has been decided whether its source address is translated.
    SRC_NAT_DONE = 1 << 7
    #: It has been decided whether its destination address is translated.
    DST_NAT_DONE = 1 << 8
    #: It is being removed.
    DYING = 1 << 9
    #: Its timeout is not refreshed.
    FIXED_TIMEOUT = 1 << 10
    #: It is a template, of the target CT.
    TEMPLATE = 1 << 11
    #: It stands for packets that are not tracked.
    UNTRACKED = 1 << 12
    #: A helper was attached to it.
    HELPER = 1 << 13
    #: A flow table forwards it.
    OFFLOAD = 1 << 14
    #: Hardware forwards it.
    HW_OFFLOAD = 1 << 15


NO_STATUS = ConntrackStatus(0)


@dataclass(frozen=True)
class ConntrackTuple:
    """One direction of a connection. What its protocol does not have is None."""

    #: The number of the transport protocol: 6 for TCP.
    protocol: int | None = None
    #: Addresses as text: IPv4's "192.0.2.1", IPv6's "2001:db8::1".
    source: str | None = None
    destination: str | None = None
    #: Ports, of TCP, UDP, SCTP and others; of GRE its keys.
    source_port: int | None = None
    destination_port: int | None = None
    #: Of ICMP and ICMPv6.
    icmp_type: int | None = None
    icmp_code: int | None = None
    icmp_id: int | None = None
    #: The zone, where this direction has one of its own.
    zone: int | None = None


@dataclass(frozen=True)
class Conntrack:
    """A connection, and what the packet is to it."""

    #: What the packet is to the connection (``NFQA_CT_INFO``); None: the kernel does not say.
    state: ConntrackState | None = None
    #: As the first packet went, and as answers come: after NAT these are not mirror images.
    original: ConntrackTuple = ConntrackTuple()
    reply: ConntrackTuple = ConntrackTuple()
    status: ConntrackStatus = NO_STATUS
    #: The connection's own number, the same for each of its packets; None: the kernel does not say.
    id: int | None = None
    #: The connection's mark, 0 by default: `-j CONNMARK`.
    mark: int = 0
    #: The zone of both directions, 0 by default: `-j CT --zone`.
    zone: int = 0
    #: Seconds until it is forgotten; None: not by time, or the kernel does not say.
    timeout: int | None = None
    #: 128 labels as 16 bytes, in the kernel's words: `-m connlabel`. None: not one is set.
    labels: bytes | None = None


def decode(content: bytes, info: bytes | None) -> Conntrack:
    """The connection in an ``NFQA_CT`` or ``NFULA_CT``, and in the ``…_CT_INFO`` beside it."""
    found = attributes(content)
    return Conntrack(
        state=state(info),
        original=decode_tuple(found.get(CTA_TUPLE_ORIG, b"")),
        reply=decode_tuple(found.get(CTA_TUPLE_REPLY, b"")),
        status=ConntrackStatus(number(found, CTA_STATUS, 4) or NO_STATUS),
        id=number(found, CTA_ID, 4),
        mark=number(found, CTA_MARK, 4) or 0,
        zone=number(found, CTA_ZONE, 2) or 0,
        timeout=number(found, CTA_TIMEOUT, 4),
        labels=sized(found, CTA_LABELS, LABELS_SIZE),
    )


def state(info: bytes | None) -> ConntrackState | None:
    value = None if info is None or len(info) != 4 else int.from_bytes(info, "big")
    return next((one for one in ConntrackState if one.value == value), None)


def decode_tuple(content: bytes) -> ConntrackTuple:
    found = attributes(content)
    ip = attributes(found.get(CTA_TUPLE_IP, b""))
    proto = attributes(found.get(CTA_TUPLE_PROTO, b""))
    return ConntrackTuple(
        protocol=number(proto, CTA_PROTO_NUM, 1),
        source=address(ip, CTA_IP_V4_SRC, CTA_IP_V6_SRC),
        destination=address(ip, CTA_IP_V4_DST, CTA_IP_V6_DST),
        source_port=number(proto, CTA_PROTO_SRC_PORT, 2),
        destination_port=number(proto, CTA_PROTO_DST_PORT, 2),
        icmp_type=either(proto, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMPV6_TYPE, 1),
        icmp_code=either(proto, CTA_PROTO_ICMP_CODE, CTA_PROTO_ICMPV6_CODE, 1),
        icmp_id=either(proto, CTA_PROTO_ICMP_ID, CTA_PROTO_ICMPV6_ID, 2),
        zone=number(found, CTA_TUPLE_ZONE, 2),
    )


def attributes(content: bytes) -> Attributes:
    """Attributes by type, up to the first that is not whole; of what is repeated, the last."""
    return dict(walk(content))


def walk(content: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + HEADER.size <= len(content):
        length, kind = HEADER.unpack_from(content, position)
        if length < HEADER.size or position + length > len(content):
            return
        yield kind & NLA_TYPE_MASK, content[position + HEADER.size : position + length]
        position += (length + 3) & ~3


def sized(found: Attributes, kind: int, size: int) -> bytes | None:
    value = found.get(kind, b"")
    return value if len(value) == size else None


def number(found: Attributes, kind: int, size: int) -> int | None:
    value = sized(found, kind, size)
    return None if value is None else int.from_bytes(value, "big")


def either(found: Attributes, kind4: int, kind6: int, size: int) -> int | None:
    value = number(found, kind4, size)
    return number(found, kind6, size) if value is None else value


def address(found: Attributes, kind4: int, kind6: int) -> str | None:
    for kind, family, size in ((kind4, socket.AF_INET, 4), (kind6, socket.AF_INET6, 16)):
        value = sized(found, kind, size)
        if value is not None:
            return socket.inet_ntop(family, value)
    return None


def encode(conntrack: Conntrack) -> bytes:
    """The content of an ``NFQA_CT`` that `decode` makes this of: for packets made by hand."""
    numbers = (
        (CTA_ZONE, conntrack.zone or None, 2),
        (CTA_ID, conntrack.id, 4),
        (CTA_STATUS, int(conntrack.status), 4),
        (CTA_TIMEOUT, conntrack.timeout, 4),
        (CTA_MARK, conntrack.mark, 4),
    )
    labels = b""
    if conntrack.labels is not None:
        if len(conntrack.labels) != LABELS_SIZE:
            raise ValueError(
                f"labels has {len(conntrack.labels)} bytes, but must have {LABELS_SIZE}, or be None"
            )
        labels = attribute(CTA_LABELS, conntrack.labels)
    return (
        nested(CTA_TUPLE_ORIG, encode_tuple(conntrack.original))
        + nested(CTA_TUPLE_REPLY, encode_tuple(conntrack.reply))
        + b"".join(integers(numbers))
        + labels
    )


def encode_tuple(direction: ConntrackTuple) -> bytes:
    ip = b""
    for text, kind4, kind6 in (
        (direction.source, CTA_IP_V4_SRC, CTA_IP_V6_SRC),
        (direction.destination, CTA_IP_V4_DST, CTA_IP_V6_DST),
    ):
        if text is not None:
            family, kind = (socket.AF_INET6, kind6) if ":" in text else (socket.AF_INET, kind4)
            ip += attribute(kind, socket.inet_pton(family, text))
    is_v6 = direction.protocol == socket.IPPROTO_ICMPV6
    proto = (
        (CTA_PROTO_NUM, direction.protocol, 1),
        (CTA_PROTO_SRC_PORT, direction.source_port, 2),
        (CTA_PROTO_DST_PORT, direction.destination_port, 2),
        (CTA_PROTO_ICMPV6_ID if is_v6 else CTA_PROTO_ICMP_ID, direction.icmp_id, 2),
        (CTA_PROTO_ICMPV6_TYPE if is_v6 else CTA_PROTO_ICMP_TYPE, direction.icmp_type, 1),
        (CTA_PROTO_ICMPV6_CODE if is_v6 else CTA_PROTO_ICMP_CODE, direction.icmp_code, 1),
    )
    return (
        nested(CTA_TUPLE_IP, ip)
        + nested(CTA_TUPLE_PROTO, b"".join(integers(proto)))
        + b"".join(integers([(CTA_TUPLE_ZONE, direction.zone, 2)]))
    )


def integers(numbers: Iterable[tuple[int, int | None, int]]) -> Iterator[bytes]:
    for kind, value, size in numbers:
        if value is not None:
            yield attribute(kind, value.to_bytes(size, "big"))


def nested(kind: int, content: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, content)


def attribute(kind: int, value: bytes) -> bytes:
    length = HEADER.size + len(value)
    return HEADER.pack(length, kind) + value + bytes(-length % 4)

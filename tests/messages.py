"""Netlink messages by hand: what the kernel says to a queue, built; its answers, taken apart.

Written from RFC 3549 and <linux/netfilter/nfnetlink_queue.h>, apart from the library's own code, so
that the two check each other. Builders can lie about lengths, the parser is strict. `Wire` stands
in for the kernel: it is where the verdicts of `netfilterqueue._handmade.packets_from` arrive.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from enum import IntEnum
from typing import Any, NamedTuple

NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = range(1, 5)
NFNL_SUBSYS_QUEUE = 3
PACKET, VERDICT, CONFIG, VERDICT_BATCH = (NFNL_SUBSYS_QUEUE << 8 | number for number in range(4))

NFQA_CFG_CMD = 1
NFQNL_CFG_CMD_UNBIND = 2

NLM_F_REQUEST = 1
NLA_F_NESTED = 1 << 15
NLA_F_NET_BYTEORDER = 1 << 14
NLA_TYPE_MASK = ~(NLA_F_NESTED | NLA_F_NET_BYTEORDER) & 0xFFFF

MESSAGE_HEADER = struct.Struct("=IHHII")  # nlmsg_len, type, flags, sequence number, port id
FAMILY_HEADER = struct.Struct("!BBH")  # family, version, queue number
ATTRIBUTE_HEADER = struct.Struct("=HH")  # nla_len, type
TIMEOUT = 5.0  # seconds; generous, as only a failing test waits so long


class NFQA(IntEnum):
    """Types of attributes (enum nfqnl_attr_type)."""

    UNSPEC = 0
    PACKET_HDR = 1
    VERDICT_HDR = 2
    MARK = 3
    TIMESTAMP = 4
    IFINDEX_INDEV = 5
    IFINDEX_OUTDEV = 6
    IFINDEX_PHYSINDEV = 7
    IFINDEX_PHYSOUTDEV = 8
    HWADDR = 9
    PAYLOAD = 10
    CT = 11
    CT_INFO = 12
    CAP_LEN = 13
    SKB_INFO = 14
    EXP = 15
    UID = 16
    GID = 17
    SECCTX = 18
    VLAN = 19
    L2HDR = 20
    PRIORITY = 21
    CGROUP_CLASSID = 22


def aligned(length: int) -> int:
    """Messages and attributes start on multiples of 4 bytes."""
    return (length + 3) & ~3


# Built: packet messages


def attribute(
    kind: int, value: bytes, *, length: int | None = None, padding: bytes = b"\0\0\0"
) -> bytes:
    """An attribute, padded; its header claims `length` bytes where given, else the truth."""
    true_length = ATTRIBUTE_HEADER.size + len(value)
    header = ATTRIBUTE_HEADER.pack(true_length if length is None else length, kind)
    return header + value + padding[: aligned(true_length) - true_length]


def packet_header(id: int = 1, hw_protocol: int = 0x0800, hook: int = 1) -> bytes:
    return attribute(NFQA.PACKET_HDR, struct.pack("!IHB", id, hw_protocol, hook))


def message(
    body: bytes, kind: int = PACKET, *, length: int | None = None, sequence: int = 0
) -> bytes:
    """A netlink message, not padded at its end; it claims `length` bytes where given."""
    true_length = MESSAGE_HEADER.size + len(body)
    return (
        MESSAGE_HEADER.pack(true_length if length is None else length, kind, 0, sequence, 0) + body
    )


def packet_message(
    *attributes: bytes,
    queue_num: int = 0,
    length: int | None = None,
    family: int = socket.AF_INET,
) -> bytes:
    """A message about a packet, with these attributes, built by `attribute`."""
    body = FAMILY_HEADER.pack(family, 0, queue_num) + b"".join(attributes)
    return message(body, length=length)


def simple_packets(*ids: int, queue_num: int = 0) -> list[bytes]:
    """A datagram for each id, with a packet that tells little more."""
    return [
        packet_message(
            packet_header(id), attribute(NFQA.PAYLOAD, b"packet %d" % id), queue_num=queue_num
        )
        for id in ids
    ]


def request(kind: int, queue_num: int, body: bytes) -> bytes:
    """What a program sends to the kernel, without asking for an answer."""
    body = FAMILY_HEADER.pack(socket.AF_UNSPEC, 0, queue_num) + body
    length = MESSAGE_HEADER.size + len(body)
    return MESSAGE_HEADER.pack(length, kind, NLM_F_REQUEST, 0, 0) + body


def unbind_request(queue_num: int) -> bytes:
    """What a program sends to give a queue up."""
    command = attribute(NFQA_CFG_CMD, struct.pack("!BBH", NFQNL_CFG_CMD_UNBIND, 0, 0))
    return request(CONFIG, queue_num, command)


def verdict_request(queue_num: int, id: int, verdict: int) -> bytes:
    """A verdict on a packet, which need not exist."""
    return request(VERDICT, queue_num, attribute(NFQA.VERDICT_HDR, struct.pack("!II", verdict, id)))


class FakeSocket:
    """For `run_socket`: gives these datagrams, or raises these errors, one by one, and keeps none;
    then nothing is pending."""

    def __init__(self, *results: Any) -> None:
        self.results = list(results)

    def recv(self, size: int) -> Any:
        if not self.results:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


# Taken apart: verdict messages


class VerdictMessage(NamedTuple):
    queue_num: int
    id: int
    verdict: int
    mark: int | None
    payload: bytes | None
    sequence: int
    changes: dict[int, Any]  # the other attributes, nested ones as dicts


def attributes_of(body: bytes) -> dict[int, bytes]:
    """The attributes by type. Fails for what is not well-formed or repeated, and for padding that
    would show the kernel what was in memory before."""
    found: dict[int, bytes] = {}
    while body:
        length, kind = ATTRIBUTE_HEADER.unpack_from(body)
        kind &= NLA_TYPE_MASK
        assert ATTRIBUTE_HEADER.size <= length
        assert aligned(length) <= len(body)
        assert kind not in found
        found[kind] = body[ATTRIBUTE_HEADER.size : length]
        assert not any(body[length : aligned(length)])
        body = body[aligned(length) :]
    return found


def verdict_of(body: bytes, sequence: int) -> VerdictMessage:
    family, version, queue_num = FAMILY_HEADER.unpack_from(body)
    assert (family, version) == (socket.AF_UNSPEC, 0)
    attributes = attributes_of(body[FAMILY_HEADER.size :])
    verdict, packet_id = struct.unpack("!II", attributes.pop(NFQA.VERDICT_HDR))
    mark = attributes.pop(NFQA.MARK, None)
    payload = attributes.pop(NFQA.PAYLOAD, None)
    changes = {
        kind: attributes_of(value) if kind in {NFQA.CT, NFQA.VLAN} else value
        for kind, value in attributes.items()
    }
    return VerdictMessage(
        queue_num,
        packet_id,
        verdict,
        None if mark is None else struct.unpack("!I", mark)[0],
        payload,
        sequence,
        changes,
    )


def verdicts_in(datagram: bytes) -> list[VerdictMessage]:
    """The verdicts of one send. Fails for anything else in it, and for what is not well-formed."""
    found = []
    while datagram:
        length, kind, flags, sequence, port = MESSAGE_HEADER.unpack_from(datagram)
        assert (kind, flags, port) == (VERDICT, NLM_F_REQUEST, 0)
        assert length == aligned(length) <= len(datagram)
        found.append(verdict_of(datagram[MESSAGE_HEADER.size : length], sequence))
        datagram = datagram[length:]
    return found


class Wire:
    """A pair of datagram sockets: `fd` for the library, the other end in the kernel's place."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._far.settimeout(TIMEOUT)

    @property
    def fd(self) -> int:
        return self._near.fileno()

    @property
    def readable(self) -> bool:
        """Whether a send has arrived that was not received yet."""
        return bool(select.select([self._far], [], [], 0)[0])

    def receive(self) -> bytes:
        """The next send; waits for it."""
        return self._far.recv(1 << 20)

    def verdicts(self) -> list[VerdictMessage]:
        """Those of the next send; waits for it."""
        return verdicts_in(self.receive())

    def ids(self) -> list[int]:
        """The packets that the next send decides; waits for it."""
        return [verdict.id for verdict in self.verdicts()]

    def arrived(self) -> list[bytes]:
        """The sends that are there already."""
        sends = []
        while self.readable:
            sends.append(self.receive())
        return sends

    def cut(self) -> None:
        """From now on sending fails, with ECONNREFUSED or ENOTCONN."""
        self._far.close()

    def mend(self) -> None:
        """Let sends arrive again after `cut`."""
        other = Wire()
        os.dup2(other.fd, self.fd)
        self._far = other._far
        other._near.close()

    def shrink(self) -> None:
        """Let sends of more than some 2 kB fail with EMSGSIZE."""
        self._near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def clog(self) -> int:
        """Let sends block until much has been received. Returns how many datagrams, each empty,
        are in their way."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self._near.send(b"", socket.MSG_DONTWAIT)
                count += 1
        return count

    def close(self) -> None:
        self._near.close()
        self._far.close()

"""What is no packet, or a broken one, on its way through a bound queue: skipped, never a crash.

`run_socket` takes whatever a `recv` gives it. What is decoded from a message is for test_decode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from messages import (
    NFQA,
    NLMSG_DONE,
    NLMSG_ERROR,
    NLMSG_NOOP,
    NLMSG_OVERRUN,
    PACKET,
    VERDICT,
    FakeSocket,
    attribute,
    message,
    packet_header,
    packet_message,
)
from netfilterqueue import NetfilterQueue, Packet
from support import wait_until_queued

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import QueuedUdp

ANOTHER_SUBSYSTEM = 1 << 8
A_VERDICT = 0x80000001  # a sequence number as verdicts have


def error_message(error: int, sequence: int = 0) -> bytes:
    """The kernel's answer to a message (struct nlmsgerr)."""
    return message(struct.pack("=i", -error) + message(b""), NLMSG_ERROR, sequence=sequence)


NOT_PACKETS = {
    "one byte": b"\0",
    "less than a header": message(b"")[:15],
    "header alone": message(b""),
    "length zero": message(bytes(32), length=0),
    "length below a header": message(bytes(32), length=15),
    "length beyond the end": message(bytes(4), length=4096),
    "greatest length": message(bytes(32), length=0xFFFFFFFF),
    "no attributes": packet_message(),
    "no packet header": packet_message(attribute(NFQA.PAYLOAD, b"payload")),
    "short packet header": packet_message(attribute(NFQA.PACKET_HDR, bytes(6))),
    "long packet header": packet_message(attribute(NFQA.PACKET_HDR, bytes(8))),
    "attribute of length zero": packet_message(bytes(64)),
    "attribute beyond the end": packet_message(attribute(NFQA.PACKET_HDR, bytes(7), length=65535)),
    "no-op": message(b"", NLMSG_NOOP),
    "done": message(bytes(4), NLMSG_DONE),
    "overrun": message(b"", NLMSG_OVERRUN),
    "short error": message(bytes(3), NLMSG_ERROR),
    "error for nobody": error_message(errno.ENOENT),
    "error for a verdict": error_message(errno.ENOENT, A_VERDICT),
    "acknowledgement": error_message(0),
    "another subsystem": message(bytes(64), ANOTHER_SUBSYSTEM),
    "another message of the queue": message(bytes(64), VERDICT),
    "a verdict like a packet": message(bytes(4) + packet_header(), VERDICT),
    "several": message(b"", NLMSG_NOOP) + packet_message() + message(b"", PACKET) + b"\1\2\3",
}


@pytest.mark.parametrize("datagram", NOT_PACKETS.values(), ids=NOT_PACKETS.keys())
def test_what_is_no_packet_is_skipped(
    queue: NetfilterQueue, queue_num: int, datagram: bytes
) -> None:
    packets: list[Packet] = []
    queue.bind(queue_num, packets.append, sock_len=4096)
    source = FakeSocket(datagram, datagram, bytearray(datagram))
    queue.run_socket(source)
    assert source.results == []
    assert packets == []


def test_packets_between_are_delivered(
    queued_udp: Callable[..., QueuedUdp], queue_num: int
) -> None:
    udp = queued_udp(callback=Packet.accept)
    payloads = [bytes([number]) for number in range(len(NOT_PACKETS))]
    udp.flow.send(*payloads)
    wait_until_queued(queue_num, len(payloads))
    with socket.socket(fileno=os.dup(udp.queue.fileno())) as same_socket:
        datagrams = [
            datagram
            for no_packet in NOT_PACKETS.values()
            for datagram in (no_packet, same_socket.recv(65536), no_packet)
        ]
    udp.queue.run_socket(FakeSocket(*datagrams))
    assert udp.flow.receive_all(len(payloads)) == payloads


def test_damaged_packets_never_crash(queue: NetfilterQueue, queue_num: int) -> None:
    whole = packet_message(
        packet_header(),
        attribute(NFQA.MARK, bytes(4)),
        attribute(NFQA.TIMESTAMP, bytes(16)),
        attribute(NFQA.HWADDR, struct.pack("!HH8s", 6, 0, bytes(8))),
        attribute(NFQA.PAYLOAD, bytes(range(60))),
    )
    seen = 0

    def look(packet: Packet) -> None:
        nonlocal seen
        seen += 1
        str(packet)
        packet.get_hw()
        packet.get_timestamp()
        with contextlib.suppress(RuntimeError):  # it may have no payload any more
            assert packet.get_payload() in datagram
            assert len(packet.get_payload()) == packet.get_payload_len()

    queue.bind(queue_num, look, sock_len=4096)
    dice = random.Random(1)
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(dice.randint(0, 3)):
            damaged[dice.randrange(len(damaged))] = dice.choice((0, 1, 4, 7, 127, 128, 255))
        if dice.random() < 0.3:
            del damaged[dice.randrange(1, len(damaged)) :]
        datagram = bytes(damaged)
        queue.run_socket(FakeSocket(datagram))
    assert seen > 500


@pytest.mark.parametrize("result", ["text", None, 7])
def test_recv_that_gives_no_bytes(queued_udp: Callable[..., QueuedUdp], result: object) -> None:
    udp = queued_udp(callback=Packet.accept)
    with pytest.raises(TypeError):
        udp.queue.run_socket(FakeSocket(result))
    udp.deliver_one(b"real")
    assert udp.flow.receive() == b"real"


def test_overruns_that_recv_reports_are_passed_over(queue: NetfilterQueue, queue_num: int) -> None:
    queue.bind(queue_num, print, sock_len=4096)
    overrun = OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
    source = FakeSocket(overrun, overrun, message(b"", NLMSG_NOOP), overrun)
    queue.run_socket(source)
    assert source.results == []

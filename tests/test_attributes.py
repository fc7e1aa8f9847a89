"""Attributes that only some packets have."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING

import pytest
from netfilterqueue._handmade import packets_from

from messages import NFQA, FakeSocket, attribute, packet_header, packet_message
from netfilterqueue import NetfilterQueue, Packet
from netfilterqueue.vlan import Vlan
from support import RECEIVE_BUFFER, decode_one, skipping

if TYPE_CHECKING:
    pass

HEADER = packet_header()
PAYLOAD = attribute(NFQA.PAYLOAD, b"\x45 a payload")
NFQA_VLAN_PROTO, NFQA_VLAN_TCI = 1, 2
CTA_MARK = 8  # of <linux/netfilter/nfnetlink_conntrack.h>


def vlan_tag(proto: int, tci: int) -> bytes:
    inner = [(NFQA_VLAN_PROTO, proto), (NFQA_VLAN_TCI, tci)]
    return b"".join(attribute(kind, struct.pack("!H", value)) for kind, value in inner)


# Made by hand


@pytest.mark.parametrize("kind", [NFQA.SECCTX, NFQA.L2HDR])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 255, 4096, 65531])
def test_attribute_of_any_length_is_all_there(kind: NFQA, length: int) -> None:
    value = bytes(itertools.islice(itertools.cycle(range(1, 128)), length))
    packet = decode_one(packet_header(), attribute(kind, value), PAYLOAD)
    seen = packet.l2_header if kind is NFQA.L2HDR else packet.secctx
    assert seen == (value if kind is NFQA.L2HDR else value.decode())


@pytest.mark.parametrize(
    "inner",
    [
        b"",
        attribute(NFQA_VLAN_PROTO, b"\x81\0"),
        attribute(NFQA_VLAN_TCI, b"\0\1"),
        attribute(NFQA_VLAN_PROTO, b"\x81") + attribute(NFQA_VLAN_TCI, b"\0\1"),
        attribute(NFQA_VLAN_PROTO, b"\x81\0") + attribute(NFQA_VLAN_TCI, b"\0\1\2"),
        *(vlan_tag(0x8100, 1)[:n] for n in range(14)),
        vlan_tag(0x8100, 1) + attribute(3, b"", length=3),
        vlan_tag(0x8100, 1) + attribute(3, b"", length=5),
    ],
)
def test_vlan_tag_that_is_not_whole_is_none(inner: bytes) -> None:
    packets, tally = packets_from([packet_message(HEADER, attribute(NFQA.VLAN, inner))])
    assert [packet.vlan for packet in packets] == [None]
    assert tally == skipping(broken_attributes=1)


def test_vlan_tag_may_have_more_to_it_than_is_known() -> None:
    unknown = attribute(3, b"new"), attribute(0, b"")
    more = unknown[0] + vlan_tag(0x88A8, 0x0FFF) + unknown[1] + unknown[0]
    assert decode_one(HEADER, attribute(NFQA.VLAN, more)).vlan == Vlan(0x88A8, 0x0FFF)


@pytest.mark.parametrize("length", [n for n in range(12) if n != 4])
def test_connections_state_of_a_wrong_length_is_none(length: int) -> None:
    connection = attribute(NFQA.CT, b""), attribute(NFQA.CT_INFO, bytes(length))
    packets, tally = packets_from([packet_message(HEADER, *connection)])
    assert [packet.conntrack and packet.conntrack.state for packet in packets] == [None]
    assert tally == skipping(broken_attributes=1)


# Read by a queue, and kept


def with_everything(number: int) -> bytes:
    return packet_message(
        packet_header(number),
        attribute(NFQA.L2HDR, b"header %08d" % number),
        attribute(NFQA.SECCTX, b"context %08d" % number),
        attribute(NFQA.CT, attribute(CTA_MARK, struct.pack("!I", number))),
        attribute(NFQA.PAYLOAD, b"\x45 payload %08d" % number),
    )


def told_by(packet: Packet) -> tuple[object, ...]:
    return packet.l2_header, packet.secctx, packet.conntrack and packet.conntrack.mark


@pytest.mark.parametrize("retained", [False, True])
def test_packets_keep_them_for_as_long_as_they_live(
    queue: NetfilterQueue, queue_num: int, retained: bool
) -> None:
    def keep(packet: Packet) -> None:
        during.append(told_by(packet))
        if retained:
            packet.retain()
        seen.append(packet)

    during: list[object] = []
    seen: list[Packet] = []
    queue.bind(queue_num, keep, sock_len=RECEIVE_BUFFER)
    numbers = range(1, 101)
    queue.run_socket(FakeSocket(*map(with_everything, numbers)))
    expected = [(b"header %08d" % n, f"context {n:08}", n) for n in numbers]
    assert during == expected
    assert [told_by(packet) for packet in seen] == expected
    # The kernel has none of them: it says so, and that is all.
    for packet in seen:
        packet.drop()
    assert [told_by(packet) for packet in seen] == expected


def test_packet_of_a_callback_that_failed_keeps_them(queue: NetfilterQueue, queue_num: int) -> None:
    def fail(packet: Packet) -> None:
        seen.append(packet)
        raise ZeroDivisionError

    seen: list[Packet] = []
    queue.bind(queue_num, fail, sock_len=RECEIVE_BUFFER)
    datagrams = FakeSocket(*map(with_everything, range(1, 11)))
    for _ in range(10):
        with pytest.raises(ZeroDivisionError):
            queue.run_socket(datagrams)
    assert [told_by(packet)[2] for packet in seen] == [*range(1, 11)]
    assert [packet.get_payload()[-1:] for packet in seen] == [
        b"%d" % (n % 10) for n in range(1, 11)
    ]
    for packet in seen:
        packet.drop()

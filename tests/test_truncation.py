"""Packets of which only the beginning was copied say so, and are not cut short by accident."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from netfilterqueue._handmade import packets_from

from messages import ATTRIBUTE_HEADER, NFQA, attribute, packet_header, packet_message
from netfilterqueue import COPY_META, NetfilterQueue, Packet
from support import decode_one, internet_checksum, run_until, skipping

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import QueuedUdp, Traffic

HEADER = packet_header()
CONTENT = b"\x45 a payload of 31 bytes, unaligned"[:31]
PAYLOAD = attribute(NFQA.PAYLOAD, CONTENT)


def numbered_bytes(count: int) -> bytes:
    """Bytes in which no part is like the next."""
    return b"".join(struct.pack("!I", number) for number in range(count // 4 + 1))[:count]


# Made by hand


@pytest.mark.parametrize("original_len", [32, 1500, 65535, 65536, 2**32 - 1])
def test_packet_longer_than_its_copy_is_truncated(original_len: int) -> None:
    cap_len = attribute(NFQA.CAP_LEN, struct.pack("!I", original_len))
    for order in ([cap_len, PAYLOAD], [PAYLOAD, cap_len]):
        packet = decode_one(HEADER, *order)
        assert (packet.original_len, packet.truncated) == (original_len, True)
        assert packet.get_payload() == CONTENT


@pytest.mark.parametrize("original_len", [0, 1, 31])
def test_packet_that_was_copied_whole_is_not_truncated(original_len: int) -> None:
    cap_len = attribute(NFQA.CAP_LEN, struct.pack("!I", original_len))
    packet = decode_one(HEADER, cap_len, PAYLOAD)
    assert (packet.original_len, packet.truncated) == (len(CONTENT), False)


@pytest.mark.parametrize("length", [n for n in range(12) if n != 4])
def test_original_length_of_a_wrong_length_is_skipped(length: int) -> None:
    broken = attribute(NFQA.CAP_LEN, b"\1" * length)
    packets, tally = packets_from([packet_message(HEADER, broken, PAYLOAD)])
    assert [(packet.original_len, packet.truncated) for packet in packets] == [(31, False)]
    assert tally == skipping(broken_attributes=1)


def test_packet_cut_by_a_small_buffer_is_truncated() -> None:
    whole = packet_message(HEADER, PAYLOAD)
    start = len(whole) - len(PAYLOAD)
    for cut in range(start, start + ATTRIBUTE_HEADER.size + len(CONTENT)):
        [packet], _ = packets_from([whole[:cut]])
        assert packet.truncated
        if cut >= start + ATTRIBUTE_HEADER.size:
            assert packet.original_len == len(CONTENT)


# On the kernel


def ipv4_of(packet: Packet, data: bytes) -> bytes:
    """An IPv4 packet like this one, with other data, and without a UDP checksum."""
    header = bytearray(packet.get_payload()[:28])
    header[2:4] = struct.pack("!H", 28 + len(data))
    header[24:28] = struct.pack("!HH", 8 + len(data), 0)
    header[10:12] = bytes(2)
    header[10:12] = struct.pack("!H", internet_checksum(bytes(header[:20])))
    return bytes(header) + data


@pytest.mark.parametrize(
    ("ipv6", "length"), [(False, 65532), (False, 65535), (True, 65532), (True, 65536)]
)
def test_packet_too_long_for_a_message_is_truncated_and_goes_on_whole(
    queued_udp: Callable[..., QueuedUdp], ipv6: bool, length: int
) -> None:
    data = numbered_bytes(length - (48 if ipv6 else 28))
    udp = queued_udp("loopback", Packet.retain, ipv6=ipv6)
    packet = udp.deliver_one(data)
    assert (packet.truncated, packet.original_len, len(packet)) == (True, length, 65531)
    assert packet.get_payload()[-4:] == data[: 65531 - length][-4:]
    packet.accept()
    assert udp.flow.receive() == data


@pytest.mark.parametrize(("ipv6", "length"), [(False, 65531), (True, 65531), (False, 1000)])
def test_packet_that_fits_into_a_message_is_whole(
    queued_udp: Callable[..., QueuedUdp], ipv6: bool, length: int
) -> None:
    data = numbered_bytes(length - (48 if ipv6 else 28))
    udp = queued_udp("loopback", Packet.retain, ipv6=ipv6)
    packet = udp.deliver_one(data)
    assert (packet.truncated, packet.original_len, len(packet)) == (False, length, length)
    packet.set_payload(packet.get_payload())
    packet.accept()
    assert udp.flow.receive() == data


def test_packet_longer_than_the_queues_range_is_truncated(
    queued_udp: Callable[..., QueuedUdp],
) -> None:
    udp = queued_udp("forward", Packet.retain, range=40)
    shorter, longer = udp.deliver(b"x" * 12, b"x" * 13)
    assert (shorter.truncated, shorter.original_len, len(shorter)) == (False, 40, 40)
    assert (longer.truncated, longer.original_len, len(longer)) == (True, 41, 40)
    longer.accept()
    shorter.accept()
    assert udp.flow.receive_all(2) == [b"x" * 13, b"x" * 12]


def test_packet_without_a_copy_is_not_truncated(queued_udp: Callable[..., QueuedUdp]) -> None:
    udp = queued_udp("forward", mode=COPY_META)
    packet = udp.deliver_one()
    assert (packet.truncated, packet.original_len) == (False, 0)
    packet.accept()
    assert udp.flow.receive() == b"hello"


def test_its_payload_is_not_given_back_by_accident(queued_udp: Callable[..., QueuedUdp]) -> None:
    udp = queued_udp("forward", Packet.retain, range=40)
    packet = udp.deliver_one(b"x" * 100)
    for payload in (packet.get_payload(), packet, ipv4_of(packet, b"y" * 200)):
        with pytest.raises(RuntimeError, match=r"only 40 of .* 128 bytes .* truncate=True"):
            packet.set_payload(payload)
    packet.set_payload(None)
    packet.accept()
    # Nothing has been changed.
    assert udp.flow.receive() == b"x" * 100


def test_it_becomes_the_new_payload_where_that_is_meant(
    queued_udp: Callable[..., QueuedUdp],
) -> None:
    udp = queued_udp("forward", Packet.retain, range=40)
    for data in (b"y" * 5, b"y" * 200):
        packet = udp.deliver_one(b"x" * 100)
        packet.set_payload(ipv4_of(packet, data), truncate=True)
        assert len(packet) == 28 + len(data)
        assert packet.truncated
        packet.accept()
        assert udp.flow.receive() == data


def test_its_own_beginning_would_be_all_that_is_left(
    queued_udp: Callable[..., QueuedUdp],
) -> None:
    """What the refusal is for: what remains is shorter than its headers say, and is lost."""
    udp = queued_udp("forward", Packet.retain, range=40)
    packet = udp.deliver_one(b"x" * 100)
    packet.set_payload(packet.get_payload(), truncate=True)
    packet.accept()
    udp.deliver_one(b"next").accept()
    assert udp.flow.receive() == b"next"


def test_unsegmented_packets_are_whole(
    traffic: Traffic, queue: NetfilterQueue, queue_num: int, rules: Callable[..., object]
) -> None:
    data = numbered_bytes(1 << 20)
    seen: list[tuple[bool, bool, int, int]] = []

    def accept(packet: Packet) -> None:
        seen.append((packet.gso, packet.truncated, packet.original_len, len(packet)))
        packet.accept()

    queue.bind(queue_num, accept, sock_len=1 << 22, gso=True)
    rules("FORWARD", "-p", "tcp", queue=queue_num)
    transfer = traffic.tcp("forward", data)
    run_until(queue, lambda: transfer.done)
    assert transfer.result() == data
    assert any(gso for gso, *_ in seen)
    assert all(length == original for _, truncated, original, length in seen if not truncated)
    # What one device may be given at once is 64 KiB with the headers of all layers.
    assert not any(truncated for _, truncated, _, _ in seen)

"""Packets of which only the beginning was copied say so, and are not cut short by accident."""

from __future__ import annotations

import struct

import pytest
from netfilterqueue._packet import packets_from

from messages import ATTRIBUTE_HEADER, NFQA, attribute, packet_header, packet_message
from support import decode_one, skipping

HEADER = packet_header()
CONTENT = b"\x45 a payload of 31 bytes, unaligned"[:31]
PAYLOAD = attribute(NFQA.PAYLOAD, CONTENT)


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
    assert tally == skipping(skipped=1)


def test_packet_cut_by_a_small_buffer_is_truncated() -> None:
    whole = packet_message(HEADER, PAYLOAD)
    start = len(whole) - len(PAYLOAD)
    for cut in range(start, start + ATTRIBUTE_HEADER.size + len(CONTENT)):
        [packet], _ = packets_from([whole[:cut]])
        assert packet.truncated
        if cut >= start + ATTRIBUTE_HEADER.size:
            assert packet.original_len == len(CONTENT)

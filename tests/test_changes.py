"""What a verdict can change besides the payload: any combination of it, in one message."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netfilterqueue._handmade import packets_from

from messages import NFQA, Wire, attribute, packet_header, packet_message
from netfilterqueue import Packet, Verdict
from netfilterqueue.testing import packet as packet_by_hand

if TYPE_CHECKING:
    from collections.abc import Callable

IPV4 = b"\x45" + bytes(19)
# Of <linux/netfilter/nfnetlink_conntrack.h> and enum nfqnl_vlan_attr.
CTA_MARK, CTA_LABELS = 8, 22
NFQA_VLAN_PROTO, NFQA_VLAN_TCI = 1, 2

L2_HEADER = b"\2\0\0\0\0\1\2\0\0\0\0\2\x08\0"


def packets_with_everything(wire: Wire, count: int) -> list[Packet]:
    """Of the bridge family, and with a connection."""
    made: list[Packet]
    made, _ = packets_from(
        [
            packet_message(
                packet_header(id),
                attribute(NFQA.L2HDR, L2_HEADER),
                attribute(NFQA.CT, b""),
                attribute(NFQA.PAYLOAD, IPV4),
                family=socket.AF_BRIDGE,
            )
            for id in range(count)
        ],
        fd=wire.fd,
        verdict_delay=60.0,
    )
    return made


class Change(NamedTuple):
    """One of them: how it is asked for, and how the kernel is told."""

    ask: Callable[[Packet, Any], object]
    values: st.SearchStrategy[Any]
    attribute: NFQA
    told: Callable[[Any], Any]


UINT32 = st.integers(0, 0xFFFFFFFF)
UINT16 = st.integers(0, 0xFFFF)
CHANGES = {
    "priority": Change(
        Packet.set_priority, UINT32, NFQA.PRIORITY, lambda value: struct.pack("!I", value)
    ),
    "conntrack_mark": Change(
        Packet.set_conntrack_mark,
        UINT32,
        NFQA.CT,
        lambda value: {CTA_MARK: struct.pack("!I", value)},
    ),
    "conntrack_labels": Change(
        Packet.set_conntrack_labels,
        st.binary(min_size=1, max_size=16),
        NFQA.CT,
        lambda value: {CTA_LABELS: value.ljust(16, b"\0")},
    ),
    "vlan": Change(
        lambda packet, value: packet.set_vlan(*value),
        st.tuples(UINT16, UINT16),
        NFQA.VLAN,
        lambda value: {
            NFQA_VLAN_PROTO: struct.pack("!H", value[0]),
            NFQA_VLAN_TCI: struct.pack("!H", value[1]),
        },
    ),
    "l2_header": Change(
        Packet.set_l2_header,
        st.binary(min_size=len(L2_HEADER), max_size=len(L2_HEADER)),
        NFQA.L2HDR,
        bytes,
    ),
}
VERDICTS: dict[Verdict, Callable[[Packet], None]] = {
    Verdict.ACCEPT: Packet.accept,
    Verdict.DROP: Packet.drop,
    Verdict.REPEAT: Packet.repeat,
    Verdict.STOP: Packet.stop,
    Verdict.QUEUE: lambda packet: packet.requeue(7),
}


class Choice(NamedTuple):
    verdict: Verdict
    mark: int | None
    payload: bytes | None
    changes: list[tuple[str, Any]]  # in the order in which they are asked for


def message_of(choice: Choice) -> tuple[Any, ...]:
    """What the kernel must be told."""
    changes: dict[int, Any] = {}
    for name, value in choice.changes:
        change = CHANGES[name]
        told = change.told(value)
        if isinstance(told, dict):
            told = {**changes.get(change.attribute, {}), **told}
        changes[change.attribute] = told
    verdict = choice.verdict | (7 << 16 if choice.verdict is Verdict.QUEUE else 0)
    return verdict, choice.mark, choice.payload, changes


CHOICES = st.builds(
    Choice,
    st.sampled_from(sorted(VERDICTS)),
    st.none() | UINT32,
    st.none() | st.binary(min_size=1, max_size=64) | st.integers(1, 65531).map(bytes),
    st.lists(
        st.sampled_from(sorted(CHANGES)).flatmap(
            lambda name: st.tuples(st.just(name), CHANGES[name].values)
        ),
        max_size=8,
    ),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(st.lists(CHOICES, min_size=1, max_size=40))
def test_any_changes_leave_in_one_message_with_the_verdict(choices: list[Choice]) -> None:
    with contextlib.closing(Wire()) as wire:
        arrived = []
        for packet, choice in zip(packets_with_everything(wire, len(choices)), choices):
            for name, value in choice.changes:
                CHANGES[name].ask(packet, value)
            if choice.mark is not None:
                packet.set_mark(choice.mark)
            packet.set_payload(choice.payload)
            VERDICTS[choice.verdict](packet)
            assert packet.verdict is choice.verdict
            while wire.readable:
                arrived += wire.verdicts()
    sent = [(one.verdict, one.mark, one.payload, one.changes) for one in arrived]
    assert sent == [message_of(choice) for choice in choices]


def test_longest_header_of_a_link_layer_fits_beside_a_payload(wire: Wire) -> None:
    header = bytes(range(256)) * 16
    [packet], _ = packets_from(
        [
            packet_message(
                packet_header(), attribute(NFQA.L2HDR, bytes(len(header))), family=socket.AF_BRIDGE
            )
        ],
        fd=wire.fd,
    )
    packet.set_l2_header(header)
    packet.set_payload(bytes(65531))
    packet.accept()
    [sent] = wire.verdicts()
    assert sent.changes == {NFQA.L2HDR: header}
    assert sent.payload == bytes(65531)


def test_bytes_that_were_given_are_the_callers(wire: Wire) -> None:
    [packet] = packets_with_everything(wire, 1)
    header, labels = bytearray(L2_HEADER), bytearray(b"1")
    packet.set_l2_header(header)
    packet.set_conntrack_labels(labels)
    header.clear()
    labels.clear()
    packet.accept()
    [sent] = wire.verdicts()
    assert sent.changes[NFQA.L2HDR] == L2_HEADER
    assert sent.changes[NFQA.CT] == {CTA_LABELS: b"1".ljust(16, b"\0")}


BEYOND_32_BITS = "is {}, but must be from 0 to 4294967295"
BEYOND_16_BITS = "is {}, but must be from 0 to 65535"


@pytest.mark.parametrize(
    ("name", "value", "error", "complaint"),
    [
        *(
            (name, value, ValueError, BEYOND_32_BITS.format(value))
            for name in ("priority", "conntrack_mark")
            for value in (-1, 1 << 32)
        ),
        ("vlan", (-1, 0), ValueError, "proto " + BEYOND_16_BITS.format(-1)),
        ("vlan", (0x8100, 65536), ValueError, "tci " + BEYOND_16_BITS.format(65536)),
        ("conntrack_labels", b"", ValueError, "0 bytes of labels, but must be from 1 to 16"),
        ("conntrack_labels", bytes(17), ValueError, "17 bytes of labels, but must be from 1 to 16"),
        ("l2_header", bytes(13), ValueError, "13 bytes cannot be set: .* which has 14"),
        ("l2_header", bytes(15), ValueError, "15 bytes cannot be set: .* which has 14"),
        ("priority", "1", TypeError, "priority must be an integer, not str"),
        ("conntrack_mark", 1.5, TypeError, "mark must be an integer, not float"),
        ("vlan", (0x8100, None), TypeError, "tci must be an integer, not NoneType"),
        ("conntrack_labels", "text", TypeError, "bytes-like"),
        ("l2_header", 14, TypeError, "bytes-like"),
    ],
)
def test_change_that_cannot_be_is_refused_and_leaves_nothing(
    wire: Wire, name: str, value: Any, error: type[Exception], complaint: str
) -> None:
    [packet] = packets_with_everything(wire, 1)
    with pytest.raises(error, match=complaint):
        CHANGES[name].ask(packet, value)
    packet.accept()
    assert [sent.changes for sent in wire.verdicts()] == [{}]


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("conntrack_mark", 1, "bind with conntrack=True"),
        ("conntrack_labels", b"1", "bind with conntrack=True"),
        ("vlan", (0x8100, 1), "not come from the bridge family"),
        ("l2_header", L2_HEADER, "not come from the bridge family"),
    ],
)
def test_change_that_the_kernel_would_ignore_is_refused(
    name: str, value: Any, complaint: str
) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        CHANGES[name].ask(packet_by_hand(IPV4), value)


def test_bridged_packet_without_a_header_gets_none() -> None:
    [packet], _ = packets_from([packet_message(packet_header(), family=socket.AF_BRIDGE)])
    packet.set_vlan(0x8100, 1)
    with pytest.raises(ValueError, match=r"14 bytes cannot be set.*which has 0"):
        packet.set_l2_header(L2_HEADER)

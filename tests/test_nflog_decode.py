"""What is read out of a log message, by hand-made messages: no kernel, no rights."""

from __future__ import annotations

import socket
import struct
from enum import IntEnum
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import FAMILY_HEADER, NLA_F_NESTED, NLMSG_DONE, aligned, attribute, message
from netfilterqueue import Hook, _nflog  # type: ignore[attr-defined]
from netfilterqueue.conntrack import Conntrack, ConntrackState, ConntrackTuple, encode
from netfilterqueue.nflog import NflogData
from netfilterqueue.vlan import Vlan

NFNL_SUBSYS_ULOG = 4
LOG, CONFIG = (NFNL_SUBSYS_ULOG << 8 | number for number in range(2))

NAMES = [
    *("proto", "hwtype", "nfmark", "timestamp", "timestamp_us"),
    *("indev", "physindev", "outdev", "physoutdev", "uid", "gid", "hwaddr", "hwhdr"),
    *("payload", "prefix", "hook", "seq", "seq_global", "vlan", "conntrack"),
]


class NFULA(IntEnum):
    """Types of attributes (enum nfulnl_attr_type)."""

    PACKET_HDR = 1
    MARK = 2
    TIMESTAMP = 3
    IFINDEX_INDEV = 4
    IFINDEX_OUTDEV = 5
    IFINDEX_PHYSINDEV = 6
    IFINDEX_PHYSOUTDEV = 7
    HWADDR = 8
    PAYLOAD = 9
    PREFIX = 10
    UID = 11
    SEQ = 12
    SEQ_GLOBAL = 13
    GID = 14
    HWTYPE = 15
    HWHEADER = 16
    HWLEN = 17
    CT = 18
    CT_INFO = 19
    VLAN = 20


def log_message(*attributes: bytes, length: int | None = None) -> bytes:
    body = FAMILY_HEADER.pack(socket.AF_INET, 0, 5) + b"".join(attributes)
    return message(body, LOG, length=length)


def numbered(*numbers: int) -> list[bytes]:
    return [log_message(attribute(NFULA.SEQ, struct.pack("!I", number))) for number in numbers]


def together(*messages: bytes) -> bytes:
    """One datagram: each message but the last padded to where the next may start."""
    return b"".join(each.ljust(aligned(len(each)), b"\0") for each in messages)


def one(*attributes: bytes) -> NflogData:
    (data,), _ = _nflog.messages_from([log_message(*attributes)])
    assert isinstance(data, NflogData)
    return data


class Field(NamedTuple):
    kind: int
    value: bytes
    name: str
    expected: Any
    absent: Any = None


LOOPBACK = socket.if_nametoindex("lo").to_bytes(4, "big")
FIXED = [
    Field(NFULA.PACKET_HDR, b"\x86\xdd\x03\0", "proto", 0x86DD),
    Field(NFULA.PACKET_HDR, b"\x86\xdd\x03\0", "hook", Hook.OUTPUT),
    Field(NFULA.MARK, b"\x01\x02\x03\x04", "nfmark", 0x01020304, absent=0),
    Field(NFULA.TIMESTAMP, struct.pack("!QQ", 1700000000, 7), "timestamp", 1700000000.000007),
    Field(NFULA.TIMESTAMP, struct.pack("!QQ", 2**40, 7), "timestamp_us", 2**40 * 1000000 + 7),
    Field(NFULA.IFINDEX_INDEV, LOOPBACK, "indev", "lo"),
    Field(NFULA.IFINDEX_OUTDEV, LOOPBACK, "outdev", "lo"),
    Field(NFULA.IFINDEX_PHYSINDEV, LOOPBACK, "physindev", "lo"),
    Field(NFULA.IFINDEX_PHYSOUTDEV, LOOPBACK, "physoutdev", "lo"),
    Field(NFULA.HWADDR, struct.pack("!HH8s", 6, 0, b"abcdefgh"), "hwaddr", b"abcdef"),
    Field(NFULA.UID, b"\xff\xff\xff\xfe", "uid", 2**32 - 2),
    Field(NFULA.GID, b"\0\0\0\0", "gid", 0),
    Field(NFULA.SEQ, b"\0\0\0\x09", "seq", 9),
    Field(NFULA.SEQ_GLOBAL, b"\xff\0\0\0", "seq_global", 0xFF000000),
    Field(NFULA.HWTYPE, b"\x03\x04", "hwtype", 772),
]
ANY_LENGTH = [
    Field(NFULA.PAYLOAD, bytes(range(61)), "payload", bytes(range(61))),
    Field(NFULA.PAYLOAD, b"", "payload", b""),
    Field(NFULA.HWHEADER, bytes(14), "hwhdr", bytes(14)),
    Field(NFULA.PREFIX, b"a prefix \xc3\xa4\0", "prefix", "a prefix \xe4"),
    Field(NFULA.PREFIX, b"no end", "prefix", "no end"),
    Field(NFULA.PREFIX, b"\0", "prefix", ""),
    Field(NFULA.PREFIX, b"Latin-1 \xe4\0", "prefix", "Latin-1 \udce4"),
]


@pytest.mark.parametrize("field", [*FIXED, *ANY_LENGTH], ids=lambda field: field.name)
def test_attribute_is_read(field: Field) -> None:
    other = [attribute(each.kind, each.value) for each in FIXED if each.kind != field.kind]
    data = one(*other, attribute(field.kind, field.value))
    assert getattr(data, field.name) == field.expected
    assert type(getattr(data, field.name)) in (type(field.expected), int)
    assert getattr(one(*other), field.name) == field.absent


@pytest.mark.parametrize("field", FIXED, ids=lambda field: field.name)
@pytest.mark.parametrize("change", [-1, 1, 4])
def test_attribute_of_a_wrong_length_is_absent(field: Field, change: int) -> None:
    value = (field.value + bytes(4))[: len(field.value) + change]
    data = one(attribute(field.kind, value), attribute(NFULA.PAYLOAD, b"next"))
    assert getattr(data, field.name) == field.absent
    assert data.payload == b"next"


def test_hardware_address_longer_than_its_room_is_absent() -> None:
    assert one(attribute(NFULA.HWADDR, struct.pack("!HH8s", 9, 0, bytes(8)))).hwaddr is None


def test_interface_that_does_not_exist_has_no_name() -> None:
    assert one(attribute(NFULA.IFINDEX_INDEV, b"\x7f\xff\xff\xff")).indev is None


def test_vlan_is_a_nested_attribute() -> None:
    proto, tci = attribute(1, b"\x81\0"), attribute(2, b"\x20\x05")
    kind = NFULA.VLAN | NLA_F_NESTED
    assert one(attribute(kind, proto + tci)).vlan == Vlan(0x8100, 0x2005)
    assert one(attribute(kind, tci + proto)).vlan == Vlan(0x8100, 0x2005)
    assert one(attribute(kind, tci)).vlan is None
    assert one(attribute(kind, proto + tci[:-4])).vlan is None
    assert one().vlan is None


def test_connection_is_decoded() -> None:
    original = ConntrackTuple(protocol=17, source="192.0.2.1", destination="192.0.2.2")
    connection = Conntrack(original=original, mark=7, id=9)
    content = attribute(NFULA.CT | NLA_F_NESTED, encode(connection))
    info = attribute(NFULA.CT_INFO, struct.pack("!I", ConntrackState.ESTABLISHED.value))
    assert one(content).conntrack == connection
    found = one(content, info).conntrack
    assert found is not None
    assert (found.state, found.original) == (ConntrackState.ESTABLISHED, original)
    assert one(info).conntrack is None


def test_message_without_attributes_has_none_of_them() -> None:
    assert dict(one()) == {**dict.fromkeys(NAMES), "nfmark": 0}


def test_dict_has_every_attribute() -> None:
    data = one(*(attribute(each.kind, each.value) for each in [*FIXED, *ANY_LENGTH]))
    assert list(dict(data)) == NAMES
    assert dict(data) == {name: getattr(data, name) for name in NAMES}
    assert {name for name in dir(data) if name[0] != "_"} == {*NAMES}
    assert repr(data) == f"<NflogData {dict(data)}>"


@pytest.mark.parametrize("name", NAMES)
def test_attributes_are_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(one(), name, 1)


def test_datagram_holds_many_messages() -> None:
    done = message(bytes(4), NLMSG_DONE)
    foreign = message(bytes(16), CONFIG)
    datagram = together(*numbered(*range(40)), foreign, *numbered(*range(40, 100)), done)
    messages, lost = _nflog.messages_from([datagram, *numbered(100, 101)])
    assert [data.seq for data in messages] == list(range(102))
    assert lost == 0


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [((0, 1, 2), 0), ((3,), 3), ((0, 2, 3, 7), 4), ((2**32 - 1, 0, 2), 2**32 - 1 + 1)],
)
def test_missing_messages_are_counted(numbers: tuple[int, ...], expected: int) -> None:
    assert _nflog.messages_from(numbered(*numbers))[1] == expected


def test_missing_messages_are_counted_where_a_datagram_begins() -> None:
    """They get lost by the datagram: a gap within one would show with the next."""
    first, second = numbered(2, 3, 4), numbered(7, 9)
    assert _nflog.messages_from([together(*first), together(*second)])[1] == 2 + 2
    assert _nflog.messages_from([together(*first), together(*second), *numbered(10)])[1] == 5


def test_messages_of_other_kinds_are_skipped() -> None:
    others = [message(bytes(64), kind) for kind in (CONFIG, 3 << 8, 0x7FFF)]
    assert _nflog.messages_from(others) == ([], 0)


def read_everything(datagrams: list[bytes]) -> list[NflogData]:
    messages, _ = _nflog.messages_from(datagrams)
    for data in messages:
        values = dict(data)
        for name in ("payload", "hwhdr", "hwaddr"):
            if values[name] is not None:
                assert any(values[name] in datagram for datagram in datagrams)
    return list(messages)


@settings(derandomize=True, max_examples=500, deadline=None, database=None)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_garbage_never_crashes(datagrams: list[bytes]) -> None:
    read_everything(datagrams)


kinds = st.one_of(st.sampled_from(list(NFULA)), st.integers(0, 0xFFFF))
attributes = st.builds(
    attribute, kinds, st.binary(max_size=40), length=st.none() | st.integers(0, 80)
)
log_messages = st.builds(
    lambda parts, length: log_message(*parts, length=length),
    st.lists(attributes, max_size=8),
    st.none() | st.integers(0, 400),
)
datagrams = st.builds(
    lambda parts, cut: together(*parts)[: cut or None],
    st.lists(log_messages, min_size=1, max_size=5),
    st.integers(-20, 0),
)


@settings(derandomize=True, max_examples=1000, deadline=None, database=None)
@given(st.lists(datagrams, min_size=1, max_size=3))
def test_damaged_messages_never_crash(datagrams: list[bytes]) -> None:
    read_everything(datagrams)


def test_damage_reaches_the_attributes() -> None:
    broken = attribute(NFULA.PAYLOAD, b"payload", length=4000)
    (data,) = read_everything([log_message(attribute(NFULA.SEQ, bytes(4)), broken)])
    assert data.seq == 0
    assert data.payload is None


def test_objects_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="cannot be constructed"):
        NflogData()
    # Not even by the back door does it crash.
    assert dict(NflogData.__new__(NflogData)) == {**dict.fromkeys(NAMES), "nfmark": 0}

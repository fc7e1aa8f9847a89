"""`netfilterqueue.testing.packet`: packets for those who test their own callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import Hook, Packet, Verdict
from netfilterqueue.conntrack import Conntrack, ConntrackState, ConntrackStatus, ConntrackTuple
from netfilterqueue.testing import packet
from netfilterqueue.vlan import Vlan

if TYPE_CHECKING:
    from collections.abc import Callable

IPV4 = b"\x45" + bytes(8) + b"\x06" + bytes(10) + b"data"
IPV6 = b"\x60" + bytes(5) + b"\x11" + bytes(33) + b"data"
LARGEST = 0xFFFFFFFF
FLAGS = ("checksum_ready", "checksum_verified", "gso")
CONNTRACK = Conntrack(
    state=ConntrackState.ESTABLISHED_REPLY,
    original=ConntrackTuple(6, "192.0.2.1", "192.0.2.2", 1024, 80, zone=3),
    reply=ConntrackTuple(58, "2001:db8::1", "::", icmp_type=128, icmp_code=0, icmp_id=65535),
    status=ConntrackStatus.CONFIRMED | ConntrackStatus.ASSURED,
    id=LARGEST,
    mark=7,
    zone=65535,
    timeout=0,
    labels=bytes(range(16)),
)


def test_packet_is_a_real_one_with_a_payload_and_little_else() -> None:
    made = packet(IPV4)
    assert type(made) is Packet
    assert made.get_payload() == bytes(memoryview(made)) == IPV4
    assert (made.id, made.queue_num, made.hook) == (1, 0, Hook.INPUT)
    assert (made.mark, made.get_mark()) == (0, 0)
    assert (made.indev, made.outdev, made.physindev, made.physoutdev) == (0, 0, 0, 0)
    assert (made.get_hw(), made.get_timestamp()) == (None, 0.0)
    assert (made.indev_name, made.outdev_name) == (None, None)
    assert (made.physindev_name, made.physoutdev_name) == (None, None)
    assert (made.uid, made.gid, made.secctx, made.conntrack) == (None, None, None, None)
    assert (made.vlan, made.l2_header, made.priority, made.cgroup_classid) == (None, None, 0, 0)
    assert (made.original_len, made.truncated) == (len(IPV4), False)
    assert (made.checksum_ready, made.checksum_verified, made.gso) == (True, True, False)
    assert made.verdict is None
    assert str(made) == "TCP packet, 24 bytes"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hook", Hook.POSTROUTING),
        ("id", LARGEST),
        ("queue_num", 65535),
        ("hw_protocol", 0x88CC),
        *((name, LARGEST) for name in ("mark", "indev", "outdev", "physindev", "physoutdev")),
        ("priority", LARGEST),
        ("cgroup_classid", 0x10001),
        ("uid", 0),
        ("uid", LARGEST),
        ("gid", 0),
        ("gid", LARGEST),
        ("secctx", "system_u:object_r:ssh_t:s0"),
        ("vlan", Vlan(0x8100, 0)),
        ("vlan", (0x88A8, 0xFFFF)),
        ("l2_header", bytes(range(14))),
        ("original_len", 24),
        ("original_len", 65535),
        *((f"{name}_name", "eth0") for name in ("indev", "outdev", "physindev", "physoutdev")),
        *((name, value) for name in FLAGS for value in (True, False)),
        ("conntrack", Conntrack()),
        ("conntrack", CONNTRACK),
    ],
)
def test_packet_says_what_was_given(name: str, value: object) -> None:
    arguments: dict[str, Any] = {name: value}
    made = packet(IPV4, **arguments)
    assert getattr(made, name) == value
    assert made.get_payload() == IPV4


def test_interfaces_have_the_names_and_indexes_given() -> None:
    made = packet(IPV4, indev=7, indev_name="eth0", outdev_name="eth1", physindev=9)
    assert (made.indev, made.indev_name, made.outdev_name) == (7, "eth0", "eth1")
    assert made.outdev not in {0, 7}
    assert (made.physindev, made.physindev_name) == (9, None)


def test_packet_shorter_than_its_original_is_truncated() -> None:
    assert packet(IPV4, original_len=len(IPV4) + 1).truncated
    assert not packet(IPV4, original_len=len(IPV4)).truncated


@pytest.mark.parametrize("length", range(1, 9))
def test_hardware_address_is_what_was_given(length: int) -> None:
    address = bytes(range(length))
    assert packet(IPV4, hw=address).get_hw() == address


@pytest.mark.parametrize("timestamp", [0.0, 0.000001, 0.25, 1700000000, 1234567890.123456])
def test_time_stamp_is_what_was_given_to_the_microsecond(timestamp: float) -> None:
    assert packet(IPV4, timestamp=timestamp).get_timestamp() == timestamp


@pytest.mark.parametrize(
    ("payload", "hw_protocol"), [(IPV4, 0x0800), (IPV6, 0x86DD), (b"\x90", 0), (None, 0)]
)
def test_link_layers_protocol_is_that_of_the_ip_version(
    payload: bytes | None, hw_protocol: int
) -> None:
    assert packet(payload).hw_protocol == hw_protocol


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_payload_is_bytes_like(kind: Callable[[bytes], Any]) -> None:
    assert packet(kind(IPV6)).get_payload() == IPV6


@pytest.mark.parametrize("length", [1, 2, 3, 65531])
def test_payload_has_any_length_that_a_packet_has(length: int) -> None:
    assert packet(bytes(length)).get_payload() == bytes(length)


def test_without_a_payload_it_is_as_in_copy_meta_mode() -> None:
    made = packet(None, mark=5)
    assert (made.mark, made.get_payload_len()) == (5, 0)
    with pytest.raises(RuntimeError, match="using COPY_META mode"):
        made.get_payload()
    made.drop()
    assert made.verdict is Verdict.DROP


@pytest.mark.parametrize(
    ("decide", "verdict"),
    [
        (Packet.accept, Verdict.ACCEPT),
        (Packet.drop, Verdict.DROP),
        (Packet.repeat, Verdict.REPEAT),
    ],
)
def test_verdict_and_changes_can_be_looked_at(
    decide: Callable[[Packet], None], verdict: Verdict
) -> None:
    made = packet(IPV4, mark=1)
    made.set_payload(IPV6)
    made.set_mark(2)
    decide(made)
    assert made.verdict is verdict
    assert (made.get_payload(), made.get_mark(), made.mark) == (IPV6, 2, 1)
    with pytest.raises(RuntimeError, match="Verdict already given for this packet"):
        made.accept()


def test_payload_stays_readable_as_if_retained() -> None:
    buffer = bytearray(IPV4)
    made = packet(buffer)
    buffer[:] = bytes(len(buffer))
    assert made.get_payload() == IPV4
    made.retain()
    made.accept()
    assert made.get_payload() == IPV4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"payload": b""}, "payload has 0 bytes, but must have 1 to 65531, or be None"),
        ({"payload": bytes(65532)}, "payload has 65532 bytes, but must have 1 to 65531"),
        ({"hw": b""}, "hw has 0 bytes, but must have 1 to 8, or be None"),
        ({"hw": bytes(9)}, "hw has 9 bytes, but must have 1 to 8"),
        ({"hook": 5}, "hook is 5, but must be from 0 to 4"),
        ({"queue_num": 65536}, "queue_num is 65536, but must be from 0 to 65535"),
        ({"hw_protocol": -1}, "hw_protocol is -1, but must be from 0 to 65535"),
        *(
            ({name: value}, f"{name} is {value}, but must be from 0 to 4294967295")
            for name in (
                *("id", "mark", "indev", "outdev", "physindev", "physoutdev", "priority"),
                *("cgroup_classid", "uid", "gid", "original_len"),
            )
            for value in (-1, 1 << 32)
        ),
        ({"vlan": (65536, 0)}, "vlan.proto is 65536, but must be from 0 to 65535"),
        ({"vlan": Vlan(0x8100, -1)}, "vlan.tci is -1, but must be from 0 to 65535"),
        ({"conntrack": Conntrack(labels=b"1")}, "labels has 1 bytes, but must have 16, or be None"),
        ({"l2_header": b""}, "l2_header has 0 bytes, but must have 1 to 65531"),
        ({"timestamp": -0.5}, "timestamp is -0.5 seconds, but must be from 0 to"),
        ({"timestamp": float("nan")}, "timestamp is nan seconds, but must be from 0 to"),
        ({"timestamp": float("inf")}, "timestamp is inf seconds, but must be from 0 to"),
    ],
)
def test_value_that_no_packet_has_is_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        packet(**{"payload": IPV4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"payload": "text"}, "payload must be a bytes-like object, not 'str'"),
        ({"payload": 20}, "payload must be a bytes-like object, not 'int'"),
        ({"hw": "02:00:00:00:00:01"}, "hw must be a bytes-like object, not 'str'"),
        ({"mark": ""}, "mark must be an integer, not str"),
        ({"secctx": b"ssh_t"}, "secctx must be a str, not bytes"),
        ({"mark": "7"}, "mark must be an integer, not str"),
        ({"hook": "INPUT"}, "hook must be an integer, not str"),
        ({"indev": "eth0"}, "indev must be an integer, not str"),
        ({"timestamp": "now"}, "timestamp must be a number of seconds, not str"),
        ({"verdict": Verdict.DROP}, "unexpected keyword argument 'verdict'"),
    ],
)
def test_value_of_another_type_is_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        packet(**{"payload": IPV4, **arguments})

"""Packets as objects: what they look like as text, and that nobody makes or forges them."""

from __future__ import annotations

import copy
import inspect
import pickle
import socket
from typing import TYPE_CHECKING, NamedTuple

import pytest

from netfilterqueue import COPY_META, NetfilterQueue, Packet
from netfilterqueue.testing import packet as packet_of
from support import RECEIVE_BUFFER, QueuedUdp, Route, run_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Rule, Sandbox

# An IPv4 header without addresses.
PAYLOAD = bytes([0x45, 0, 0, 20, 0, 0, 0, 0, 64, socket.IPPROTO_TCP]) + bytes(10)

ATTRIBUTES = [name for name, member in vars(Packet).items() if inspect.isgetsetdescriptor(member)]

both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])


class Datagram(NamedTuple):
    """What a raw socket sends, and how `str` describes its packet."""

    protocol: int
    text: str


# Lengths are those of the payload and of the header that the kernel puts before it, 20 or 40 bytes.
DATAGRAMS = {
    False: [
        Datagram(socket.IPPROTO_TCP, "TCP packet, 60 bytes"),
        Datagram(socket.IPPROTO_UDP, "UDP packet, 60 bytes"),
        Datagram(socket.IPPROTO_ICMP, "ICMP packet, 60 bytes"),
        Datagram(200, "Unknown protocol packet, 60 bytes"),
    ],
    True: [
        Datagram(socket.IPPROTO_TCP, "TCP packet, 80 bytes"),
        Datagram(socket.IPPROTO_UDP, "UDP packet, 80 bytes"),
        Datagram(socket.IPPROTO_ICMPV6, "IPv6-ICMP packet, 80 bytes"),
        Datagram(200, "Unknown protocol packet, 80 bytes"),
    ],
}


class TestText:
    @pytest.mark.parametrize(
        ("ipv6", "datagram"),
        [(ipv6, datagram) for ipv6, datagrams in DATAGRAMS.items() for datagram in datagrams],
    )
    def test_str_names_the_protocol_and_the_length(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        rules: Callable[..., Rule],
        sandbox: Sandbox,
        ipv6: bool,
        datagram: Datagram,
    ) -> None:
        texts: list[str] = []
        queue.bind(queue_num, lambda packet: texts.append(str(packet)), sock_len=RECEIVE_BUFFER)
        rules("INPUT", "-p", datagram.protocol, queue=queue_num, ipv6=ipv6)
        route = Route.of(sandbox, "input", ipv6=ipv6)
        with route.source.socket(route.family, socket.SOCK_RAW, datagram.protocol) as sender:
            sender.sendto(bytes(40), (route.address, 0))
        run_until(queue, lambda: texts)
        assert texts == [datagram.text]

    @pytest.mark.parametrize(
        "header", ["IPV6_HOPOPTS", "IPV6_DSTOPTS"], ids=["hop by hop", "destination"]
    )
    def test_str_finds_the_protocol_behind_extension_headers(
        self, queued_udp: Callable[..., QueuedUdp], header: str
    ) -> None:
        texts: list[str] = []
        queued = queued_udp("input", lambda packet: texts.append(str(packet)), ipv6=True)
        # Next header and length, filled in by the kernel, then 6 bytes of padding (RFC 8200 4.2).
        option = bytes([0, 0, 1, 4, 0, 0, 0, 0])
        queued.flow.sender.setsockopt(socket.IPPROTO_IPV6, getattr(socket, header), option)
        packet = queued.deliver_one(b"hello")
        assert len(packet) == 40 + len(option) + 8 + 5
        assert texts == ["UDP packet, 61 bytes"]

    @both_families
    def test_str_of_a_part_of_the_packet_names_the_protocol_too(
        self, queued_udp: Callable[..., QueuedUdp], ipv6: bool
    ) -> None:
        texts: list[str] = []
        queued = queued_udp(callback=lambda packet: texts.append(str(packet)), range=20, ipv6=ipv6)
        queued.deliver_one()
        assert texts == ["UDP packet, 20 bytes"]

    def test_str_says_when_the_payload_was_not_retained(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        assert str(queued_udp().deliver_one(b"hello")) == "33 byte packet, contents unretained"

    def test_str_of_a_retained_packet_is_the_same_after_the_callback(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        packet = queued_udp(callback=Packet.retain).deliver_one(b"hello")
        assert str(packet) == f"{packet}" == "UDP packet, 33 bytes"

    def test_str_without_payload(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        packet = queued_udp(mode=COPY_META).deliver_one()
        assert str(packet) == "0 byte packet, contents unretained"

    def test_str_shows_what_set_payload_was_given(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        packet = queued_udp().deliver_one()
        packet.set_payload(PAYLOAD)
        assert str(packet) == "TCP packet, 20 bytes"

    @pytest.mark.parametrize("payload", [b"\x45", bytes(60), b"\x60" + bytes(5), b"\xff" * 60])
    def test_str_of_what_is_no_ip_packet(self, payload: bytes) -> None:
        assert str(packet_of(payload)) == f"Unknown protocol packet, {len(payload)} bytes"


def refused(call: Callable[[], object]) -> str:
    """The text of the RuntimeError that a call raises."""
    with pytest.raises(RuntimeError) as error:
        call()
    return str(error.value)


# What each member is on an object that no queue has made.
BLANK: dict[str, Callable[[Packet], object]] = {
    **{
        name: lambda packet, name=name: not getattr(packet, name)  # type: ignore[misc]
        for name in ATTRIBUTES
    },
    "checksum_ready": lambda packet: packet.checksum_ready,
    "checksum_verified": lambda packet: packet.checksum_verified,
    "get_hw": lambda packet: packet.get_hw() is None,
    "get_timestamp": lambda packet: packet.get_timestamp() == 0.0,
    "get_payload": lambda packet: "no payload" in refused(packet.get_payload),
    "get_payload_len": lambda packet: packet.get_payload_len() == 0,
    "get_mark": lambda packet: packet.get_mark() == 0,
    "set_mark": lambda packet: (packet.set_mark(1), packet.get_mark())[1] == 1,  # type: ignore[func-returns-value]
    "set_payload": lambda packet: (packet.set_payload(b"1"), bytes(packet))[1] == b"1",
    "retain": lambda packet: "no payload" in refused(packet.retain),
    "accept": lambda packet: "no queue" in refused(packet.accept),
    "drop": lambda packet: "no queue" in refused(packet.drop),
    "repeat": lambda packet: "no queue" in refused(packet.repeat),
    "stop": lambda packet: "no queue" in refused(packet.stop),
    "requeue": lambda packet: "no queue" in refused(lambda: packet.requeue(1)),
    "set_priority": lambda packet: packet.set_priority(1) is None,  # type: ignore[func-returns-value]
    "set_conntrack_mark": lambda packet: (
        "came without" in refused(lambda: packet.set_conntrack_mark(1))
    ),
    "set_conntrack_labels": lambda packet: (
        "came without" in refused(lambda: packet.set_conntrack_labels(b"1"))
    ),
    "set_vlan": lambda packet: "bridge family" in refused(lambda: packet.set_vlan(0x8100, 1)),
    "set_l2_header": lambda packet: "bridge family" in refused(lambda: packet.set_l2_header(b"")),
    "__len__": lambda packet: len(packet) == 0,
    "__bytes__": lambda packet: "no payload" in refused(packet.__bytes__),
    "__buffer__": lambda packet: "no payload" in refused(lambda: memoryview(packet)),
    "__str__": lambda packet: str(packet) == "0 byte packet, contents unretained",
    "__repr__": lambda packet: repr(packet).startswith("<netfilterqueue.Packet object at "),
    "__eq__": lambda packet: packet == packet,  # noqa: PLR0124
    "__hash__": lambda packet: {packet} == {packet},
}


class TestType:
    @pytest.mark.parametrize("arguments", [(), (b"payload",)])
    def test_packets_cannot_be_constructed(self, arguments: tuple[object, ...]) -> None:
        construct: Callable[..., Packet] = Packet
        with pytest.raises(TypeError, match=r"cannot be constructed.*netfilterqueue\.testing"):
            construct(*arguments)

    def test_object_cannot_make_one_either(self) -> None:
        with pytest.raises(TypeError, match="not safe"):
            object.__new__(Packet)

    def test_init_of_a_packet_cannot_be_called_again(self) -> None:
        packet = packet_of(PAYLOAD)
        with pytest.raises(TypeError, match="cannot be constructed"):
            packet.__init__()
        assert packet.get_payload() == PAYLOAD

    def test_type_cannot_be_subclassed(self) -> None:
        with pytest.raises(TypeError, match="not an acceptable base type"):
            type("Mine", (Packet,), {})

    def test_type_cannot_be_changed(self) -> None:
        with pytest.raises(TypeError, match=r"immutable|can't set attributes"):
            Packet.accept = Packet.drop  # type: ignore[method-assign]

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_packets_cannot_be_pickled(self, protocol: int) -> None:
        packet = packet_of(PAYLOAD)
        with pytest.raises(TypeError, match=r"pickle.*Packet"):
            pickle.dumps(packet, protocol)

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
    def test_packets_cannot_be_copied(self, duplicate: Callable[[Packet], Packet]) -> None:
        packet = packet_of(PAYLOAD)
        with pytest.raises(TypeError, match=r"pickle.*Packet"):
            duplicate(packet)

    @pytest.mark.parametrize("name", ATTRIBUTES)
    def test_attribute_cannot_be_set(self, name: str) -> None:
        packet = packet_of(PAYLOAD)
        before = getattr(packet, name)
        with pytest.raises(AttributeError, match=name):
            setattr(packet, name, 7)
        with pytest.raises(AttributeError, match=name):
            delattr(packet, name)
        assert getattr(packet, name) == before

    @pytest.mark.parametrize("name", ["foo", "__dict__"])
    def test_other_attributes_cannot_be_added(self, name: str) -> None:
        with pytest.raises(AttributeError, match=name):
            setattr(packet_of(PAYLOAD), name, {})

    def test_packets_are_equal_to_themselves_only(self) -> None:
        one, other = packet_of(PAYLOAD), packet_of(PAYLOAD)
        assert one == one  # noqa: PLR0124
        assert one != other
        assert len({one, other, one}) == 2

    @pytest.mark.parametrize("payload", [PAYLOAD, None])
    def test_packet_is_true(self, payload: bytes | None) -> None:
        # Programs say `if packet:` where they mean `is not None`.
        assert packet_of(payload)

    @pytest.mark.parametrize("member", BLANK)
    def test_object_that_no_queue_has_made_is_blank(self, member: str) -> None:
        assert BLANK[member](Packet.__new__(Packet))

    def test_every_member_has_been_tried_on_a_blank_object(self) -> None:
        assert {name for name in dir(Packet) if not name.startswith("_")} <= {*BLANK}

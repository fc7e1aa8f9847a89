"""The bytes of a packet: read, kept, seen without a copy, and replaced."""

from __future__ import annotations

import array
import ctypes
import itertools
import mmap
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import COPY_META, COPY_NONE, Packet
from netfilterqueue.testing import packet as packet_of
from support import (
    RECEIVE_BUFFER,
    QueuedUdp,
    internet_checksum,
    run_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Runner, Traffic

NO_PAYLOAD = r"^Packet has no payload -- perhaps you're using COPY_META mode\?$"
TOO_LATE = (
    r"^Payload data is no longer available\. You must call retain\(\) within the user_callback in "
    r"order to copy the payload if you need to expect it after your callback has returned\.$"
)

UDP_HEADER = 8
LONGEST = 65531

both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])


def ip_header_of(packet: bytes) -> int:
    """The length of the IP header of a packet without extension headers."""
    return 40 if packet[0] >> 4 == 6 else (packet[0] & 0xF) * 4


def data_of(packet: Packet) -> bytes:
    """What the application sent in a UDP packet."""
    payload = packet.get_payload()
    return payload[ip_header_of(payload) + UDP_HEADER :]


def with_data(packet: bytes, data: bytes) -> bytes:
    """A UDP packet with other data in it, and lengths and checksums that are right."""
    size = ip_header_of(packet)
    header = bytearray(packet[:size])
    length = UDP_HEADER + len(data)
    if size == 40:
        struct.pack_into("!H", header, 4, length)
        addresses = header[8:40]
    else:
        struct.pack_into("!H", header, 2, size + length)
        struct.pack_into("!H", header, 10, 0)
        struct.pack_into("!H", header, 10, internet_checksum(bytes(header)))
        addresses = header[12:20]
    # The pseudo-header of both families adds up to the same (RFC 768, RFC 8200 section 8.1).
    pseudo_header = bytes(addresses) + struct.pack("!HH", socket.IPPROTO_UDP, length)
    segment = packet[size : size + 4] + struct.pack("!HH", length, 0) + data
    padding = bytes(len(data) % 2)
    checksum = internet_checksum(pseudo_header + segment + padding) or 0xFFFF
    return bytes(header) + segment[:6] + struct.pack("!H", checksum) + data


def double(packet: Packet) -> None:
    """Send the data twice instead of once."""
    packet.set_payload(with_data(packet.get_payload(), data_of(packet) * 2))


class TestReading:
    @both_families
    @pytest.mark.parametrize("path", ["loopback", "input", "forward", "output"])
    def test_payload_is_the_packet_from_its_ip_header_on(
        self, queued_udp: Callable[..., QueuedUdp], path: str, ipv6: bool
    ) -> None:
        payloads: list[bytes] = []
        queued = queued_udp(path, lambda packet: payloads.append(packet.get_payload()), ipv6=ipv6)
        queued.deliver_one(b"hello")
        (payload,) = payloads
        assert type(payload) is bytes
        version, size = (6, 40) if ipv6 else (4, 20)
        assert payload[0] >> 4 == version
        ports = (queued.flow.sender.getsockname()[1], queued.flow.port)
        assert struct.unpack_from("!HH", payload, size) == ports
        assert payload[size + UDP_HEADER :] == b"hello"

    def test_payload_is_available_in_the_callback_also_after_the_verdict(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        payloads: list[bytes] = []

        def callback(packet: Packet) -> None:
            payloads.append(packet.get_payload())
            packet.accept()
            payloads.append(packet.get_payload())

        queued_udp(callback=callback).deliver_one()
        assert payloads[0] == payloads[1]

    @pytest.mark.parametrize("read", [Packet.get_payload, bytes, memoryview, Packet.retain])
    def test_payload_is_gone_after_the_callback(
        self, queued_udp: Callable[..., QueuedUdp], read: Callable[[Packet], object]
    ) -> None:
        packet = queued_udp().deliver_one(b"hello")
        with pytest.raises(RuntimeError, match=TOO_LATE):
            read(packet)
        assert packet.get_payload_len() == len(packet) == 33

    def test_payload_of_a_packet_whose_callback_raised_is_kept(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def fail(packet: Packet) -> None:
            if len(queued.packets) == 1:
                raise LookupError

        queued = queued_udp(callback=fail)
        queued.flow.send(b"first", b"second")
        with pytest.raises(LookupError):
            run_until(queued.queue, lambda: False)
        run_until(queued.queue, lambda: len(queued.packets) == 2)
        assert data_of(queued.packets[0]) == b"first"
        queued.packets[0].accept()
        assert queued.flow.receive() == b"first"

    def test_bytes_and_len_are_those_of_the_payload(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        seen: list[tuple[bytes, int, int]] = []

        def callback(packet: Packet) -> None:
            seen.append((bytes(packet), len(packet), packet.get_payload_len()))
            assert bytes(packet) == packet.get_payload()

        queued_udp(callback=callback).deliver_one(b"hello")
        ((payload, *lengths),) = seen
        assert lengths == [len(payload)] * 2 == [33] * 2


class TestRetaining:
    def test_retained_payload_outlives_the_callback_and_the_queue(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        queued = queued_udp(callback=Packet.retain)
        packet = queued.deliver_one(b"kept")
        # They come into the same memory.
        for number in range(10):
            queued.deliver_one(b"%04d" % number)
        assert data_of(packet) == b"kept"
        packet.accept()
        assert queued.flow.receive() == b"kept"
        queued.queue.close()
        assert data_of(packet) == b"kept"

    def test_retain_can_be_repeated(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        def callback(packet: Packet) -> None:
            packet.retain()
            packet.retain()

        packet = queued_udp(callback=callback).deliver_one(b"hello")
        packet.retain()
        assert data_of(packet) == b"hello"

    def test_retain_after_set_payload_keeps_the_new_bytes(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def callback(packet: Packet) -> None:
            packet.set_payload(b"new")
            packet.retain()
            packet.set_payload(None)

        assert queued_udp(callback=callback).deliver_one().get_payload() == b"new"

    def test_retain_after_the_callback_is_possible_once_set_payload_was_called(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        packet = queued_udp().deliver_one()
        packet.set_payload(b"new")
        packet.retain()
        packet.set_payload(None)
        assert packet.get_payload() == b"new"

    def test_payload_is_what_was_set_else_what_was_retained_else_the_live_one(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        seen: list[bytes] = []

        def callback(packet: Packet) -> None:
            packet.set_payload(b"set")
            seen.append(packet.get_payload())
            packet.set_payload(None)
            seen.append(packet.get_payload()[-4:])
            packet.set_payload(b"retained")
            packet.retain()
            packet.set_payload(b"set again")
            seen.append(packet.get_payload())
            packet.set_payload(None)
            seen.append(packet.get_payload())

        packet = queued_udp(callback=callback).deliver_one(b"live")
        assert seen == [b"set", b"live", b"set again", b"retained"]
        assert packet.get_payload() == b"retained"

    def test_retained_packets_are_decided_with_their_own_payload(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def callback(packet: Packet) -> None:
            packet.retain()
            packet.set_payload(b"no packet at all")
            packet.retain()
            packet.set_payload(None)
            packet.accept()

        queued = queued_udp(callback=callback)
        queued.deliver_one(b"as it came")
        assert queued.flow.receive() == b"as it came"


class Text(bytes):
    """Bytes of a subclass."""


def mapped(payload: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(payload))
    memory[:] = payload
    return memory


def every_other(payload: bytes) -> memoryview:
    """A view that is not contiguous."""
    spread = bytearray(2 * len(payload))
    spread[::2] = payload
    return memoryview(spread)[::2]


FORMS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "subclass of bytes": Text,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "view with gaps": every_other,
    "array": lambda payload: array.array("B", payload),
    "ctypes": lambda payload: (ctypes.c_char * len(payload)).from_buffer_copy(payload),
    "mmap": mapped,
    "packet": packet_of,
}

# Even and odd, shorter and longer than what came, up to what a queue can be told to send.
LENGTHS = [1, 4, 5, 6, 7, 1400, 1465]


class TestReplacing:
    @both_families
    @pytest.mark.parametrize("length", LENGTHS)
    def test_new_payload_arrives_at_the_receiver(
        self, queued_udp: Callable[..., QueuedUdp], length: int, ipv6: bool
    ) -> None:
        data = bytes(range(1, 256)) * 6

        def callback(packet: Packet) -> None:
            packet.set_payload(with_data(packet.get_payload(), data[:length]))
            packet.accept()

        queued = queued_udp("input", callback, ipv6=ipv6)
        queued.deliver_one(b"hello")
        assert queued.flow.receive() == data[:length]

    @both_families
    @pytest.mark.parametrize("path", ["loopback", "input", "forward", "output"])
    def test_new_payload_goes_on_from_each_hook(
        self, queued_udp: Callable[..., QueuedUdp], path: str, ipv6: bool
    ) -> None:
        queued = queued_udp(path, double, ipv6=ipv6)
        queued.deliver_one(b"hello").accept()
        assert queued.flow.receive() == b"hellohello"

    @pytest.mark.parametrize("form", FORMS)
    def test_any_bytes_like_object_will_do(
        self, queued_udp: Callable[..., QueuedUdp], form: str
    ) -> None:
        queued = queued_udp(callback=Packet.retain)
        packet = queued.deliver_one(b"hello")
        wanted = with_data(packet.get_payload(), b"another")
        packet.set_payload(FORMS[form](wanted))
        assert packet.get_payload() == wanted
        packet.accept()
        assert queued.flow.receive() == b"another"

    def test_new_payload_is_a_copy_of_what_was_given(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        queued = queued_udp(callback=Packet.retain)
        packet = queued.deliver_one(b"hello")
        wanted = with_data(packet.get_payload(), b"another")
        given = bytearray(wanted)
        packet.set_payload(given)
        given[:] = b""  # no view of it has been kept
        assert packet.get_payload() == wanted
        packet.accept()
        assert queued.flow.receive() == b"another"

    def test_largest_payloads_of_one_read_all_arrive(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        size = LONGEST - 28
        queued = queued_udp(callback=Packet.retain)
        # Else the receiver has no room for them.
        queued.flow.receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * LONGEST)
        packets = queued.deliver(b"a", b"b")
        for packet in packets:
            packet.set_payload(with_data(packet.get_payload(), data_of(packet) * size))
            assert packet.get_payload_len() == LONGEST
        for packet in packets:
            packet.accept()
        assert queued.flow.receive_all(2) == [b"a" * size, b"b" * size]

    def test_new_payload_shows_everywhere(self) -> None:
        packet = packet_of(bytes(20))
        packet.set_payload(b"new one")
        assert packet.get_payload() == bytes(packet) == bytes(memoryview(packet)) == b"new one"
        assert packet.get_payload_len() == len(packet) == 7

    def test_none_takes_the_new_payload_back(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        seen: list[tuple[bytes, int]] = []

        def callback(packet: Packet) -> None:
            packet.set_payload(b"new")
            packet.set_payload(None)
            seen.append((packet.get_payload(), len(packet)))
            packet.accept()

        queued = queued_udp(callback=callback)
        queued.deliver_one(b"hello")
        assert queued.flow.receive() == b"hello"
        assert seen[0][0].endswith(b"hello")
        assert seen[0][1] == 33

    def test_last_payload_set_counts(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        def callback(packet: Packet) -> None:
            double(packet)
            double(packet)
            packet.accept()

        queued = queued_udp(callback=callback)
        queued.deliver_one(b"x")
        assert queued.flow.receive() == b"xxxx"

    def test_dropped_packet_does_not_arrive_with_its_new_payload_either(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        queued = queued_udp(callback=double)
        dropped, accepted = queued.deliver(b"dropped", b"accepted")
        dropped.drop()
        accepted.accept()
        assert queued.flow.receive() == b"acceptedaccepted"
        assert queued.flow.arrived() == []

    def test_repeated_packet_comes_back_with_its_new_payload(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        seen: list[bytes] = []

        def callback(packet: Packet) -> None:
            seen.append(data_of(packet))
            double(packet)
            (packet.accept if len(seen) == 2 else packet.repeat)()

        queued = queued_udp(callback=callback)
        queued.flow.send(b"x")
        run_until(queued.queue, lambda: len(seen) == 2)
        assert seen == [b"x", b"xx"]
        assert queued.flow.receive() == b"xxxx"

    def test_payload_and_mark_go_together(
        self, queued_udp: Callable[..., QueuedUdp], rules: Callable[..., object]
    ) -> None:
        queued = queued_udp(callback=double, chain="INPUT", table="mangle")
        rules("INPUT", "-m", "mark", "!", "--mark", "0x01020304", "-j", "DROP")
        packet = queued.deliver_one(b"x")
        packet.set_mark(0x01020304)
        packet.accept()
        assert queued.flow.receive() == b"xx"

    def test_payload_set_after_the_verdict_only_shows(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def callback(packet: Packet) -> None:
            packet.accept()
            double(packet)

        queued = queued_udp(callback=callback)
        packet = queued.deliver_one(b"x")
        assert queued.flow.receive() == b"x"
        assert data_of(packet) == b"xx"

    @pytest.mark.parametrize("payload", ["text", 5, [69], object()], ids=repr)
    def test_what_is_not_bytes_like_is_a_type_error(self, payload: Any) -> None:
        packet = packet_of(b"original")
        packet.set_payload(b"earlier")
        with pytest.raises(TypeError, match=f"bytes-like object.*'{type(payload).__name__}'"):
            packet.set_payload(payload)
        assert packet.get_payload() == b"earlier"

    @pytest.mark.parametrize("form", ["bytes", "bytearray", "array"])
    @pytest.mark.parametrize("length", [0, LONGEST + 1, 1 << 20])
    def test_length_that_no_packet_has_is_a_value_error(self, form: str, length: int) -> None:
        packet = packet_of(b"original")
        packet.set_payload(b"earlier")
        with pytest.raises(ValueError, match=rf"{length} bytes.* 1 to 65531.*drop\(\)"):
            packet.set_payload(FORMS[form](bytes(length)))
        assert packet.get_payload() == b"earlier"

    @pytest.mark.parametrize("length", [1, LONGEST])
    def test_shortest_and_longest_payload_can_be_set(self, length: int) -> None:
        packet = packet_of(b"original")
        packet.set_payload(payload=bytes(length))
        assert len(packet) == length


class TestCopyModes:
    @both_families
    @pytest.mark.parametrize("read", [Packet.get_payload, bytes, memoryview, Packet.retain])
    def test_meta_brings_everything_but_the_payload(
        self, queued_udp: Callable[..., QueuedUdp], read: Callable[[Packet], object], ipv6: bool
    ) -> None:
        errors: list[RuntimeError] = []

        def callback(packet: Packet) -> None:
            with pytest.raises(RuntimeError, match=NO_PAYLOAD) as raised:
                read(packet)
            errors.append(raised.value)

        queued = queued_udp("input", callback, mode=COPY_META, ipv6=ipv6)
        packet = queued.deliver_one()
        assert len(errors) == 1
        with pytest.raises(RuntimeError, match=NO_PAYLOAD):
            read(packet)
        assert packet.get_payload_len() == len(packet) == 0
        assert packet.hw_protocol == (0x86DD if ipv6 else 0x0800)
        assert packet.indev == socket.if_nametoindex("left")
        packet.accept()
        assert queued.flow.receive() == b"hello"

    def test_payload_can_be_set_without_having_been_copied(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        whole: list[bytes] = []
        queued = queued_udp(callback=lambda packet: whole.append(packet.get_payload()))
        queued.deliver_one(b"hello")
        queued.queue.unbind()
        packets: list[Packet] = []
        number = queued.packets[0].queue_num
        queued.queue.bind(number, packets.append, mode=COPY_META, sock_len=RECEIVE_BUFFER)
        queued.flow.send(b"hello")
        run_until(queued.queue, lambda: packets)
        packets[0].set_payload(with_data(whole[0], b"another"))
        assert data_of(packets[0]) == b"another"
        packets[0].accept()
        assert queued.flow.receive() == b"another"

    def test_none_has_the_kernel_drop_everything(
        self, queued_udp: Callable[..., QueuedUdp], traffic: Traffic
    ) -> None:
        queued = queued_udp(mode=COPY_NONE)
        behind = traffic.udp()
        queued.flow.send(b"hello")
        behind.send(b"not queued")
        assert behind.receive() == b"not queued"
        queued.queue.run(block=False)
        assert queued.packets == []
        assert queued.flow.arrived() == []

    @both_families
    def test_range_is_how_much_is_copied_and_the_packet_goes_on_whole(
        self, queued_udp: Callable[..., QueuedUdp], ipv6: bool
    ) -> None:
        seen: list[bytes] = []
        queued = queued_udp(
            callback=lambda packet: seen.append(packet.get_payload()), range=20, ipv6=ipv6
        )
        packet = queued.deliver_one(b"hello" * 200)
        assert [len(payload) for payload in seen] == [20] == [len(packet)]
        assert seen[0][0] >> 4 == (6 if ipv6 else 4)
        packet.accept()
        assert queued.flow.receive() == b"hello" * 200

    @pytest.mark.parametrize("options", [{}, {"range": 0}, {"range": LONGEST}, {"batch": 1}])
    def test_packet_of_65531_bytes_comes_whole(
        self, queued_udp: Callable[..., QueuedUdp], options: dict[str, int], runner: Runner
    ) -> None:
        data = bytes(itertools.islice(itertools.cycle(range(251)), LONGEST - 28))
        queued = queued_udp(callback=Packet.retain, **options)
        queued.flow.send(data)
        run_until(runner, lambda: queued.packets)
        (packet,) = queued.packets
        assert packet.get_payload_len() == LONGEST
        assert data_of(packet) == data
        packet.accept()
        assert queued.flow.receive() == data

    @pytest.mark.parametrize(
        ("ipv6", "length"),
        [(False, LONGEST + 1), (False, 65535), (True, LONGEST + 1), (True, 65536)],
    )
    def test_packet_that_is_longer_is_cut_and_can_be_decided(
        self, queued_udp: Callable[..., QueuedUdp], length: int, ipv6: bool
    ) -> None:
        headers = (40 if ipv6 else 20) + UDP_HEADER
        data = bytes(itertools.islice(itertools.cycle(range(251)), length - headers))
        queued = queued_udp(callback=Packet.retain, ipv6=ipv6)
        packet = queued.deliver_one(data)
        assert packet.get_payload_len() == LONGEST
        assert data_of(packet) == data[: LONGEST - headers]
        packet.accept()
        assert queued.flow.receive() == data

"""The connection of a packet: decoded from messages made by hand, and from the kernel's own."""

from __future__ import annotations

import dataclasses
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netfilterqueue._handmade import packets_from

from messages import NFQA, NLA_F_NESTED, attribute, packet_header, packet_message
from netfilterqueue import Packet
from netfilterqueue.conntrack import (
    Conntrack,
    ConntrackState,
    ConntrackStatus,
    ConntrackTuple,
    decode,
    encode,
)
from support import RECEIVE_BUFFER, decode_one, run_until, skipping

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue import NetfilterQueue
    from netfilterqueue.testing import Node, Rule
    from support import Traffic

# Of <linux/netfilter/nfnetlink_conntrack.h>, written down apart from the library.
TUPLE_ORIG, TUPLE_REPLY, STATUS, TIMEOUT, MARK, ID, ZONE, LABELS = 1, 2, 3, 7, 8, 12, 18, 22
TUPLE_IP, TUPLE_PROTO, TUPLE_ZONE = 1, 2, 3
V4_SRC, V4_DST, V6_SRC, V6_DST = 1, 2, 3, 4
NUM, SRC_PORT, DST_PORT, ICMP_ID, ICMP_TYPE, ICMP_CODE, ICMPV6_ID, ICMPV6_TYPE, ICMPV6_CODE = range(
    1, 10
)


def nest(kind: int, *inner: bytes) -> bytes:
    return attribute(kind | NLA_F_NESTED, b"".join(inner))


def be(kind: int, value: int, size: int) -> bytes:
    return attribute(kind, value.to_bytes(size, "big"))


def way(ip: bytes, *proto: bytes) -> bytes:
    return nest(TUPLE_IP, ip) + nest(TUPLE_PROTO, *proto)


FROM, TO = socket.inet_aton("192.0.2.1"), socket.inet_aton("198.51.100.2")
V4 = attribute(V4_SRC, FROM) + attribute(V4_DST, TO)
V4_TEXT = ("192.0.2.1", "198.51.100.2")
FROM6, TO6 = (socket.inet_pton(socket.AF_INET6, text) for text in ("2001:db8::1", "::2"))
V6 = attribute(V6_SRC, FROM6) + attribute(V6_DST, TO6)
V6_TEXT = ("2001:db8::1", "::2")

WAYS = {
    "tcp": (
        way(V4, be(NUM, 6, 1), be(SRC_PORT, 1024, 2), be(DST_PORT, 80, 2)),
        ConntrackTuple(6, *V4_TEXT, 1024, 80),
    ),
    "udp over ipv6": (
        way(V6, be(NUM, 17, 1), be(SRC_PORT, 65535, 2), be(DST_PORT, 0, 2)),
        ConntrackTuple(17, *V6_TEXT, 65535, 0),
    ),
    "sctp": (
        way(V4, be(NUM, 132, 1), be(SRC_PORT, 1, 2), be(DST_PORT, 2, 2)),
        ConntrackTuple(132, *V4_TEXT, 1, 2),
    ),
    "icmp": (
        way(V4, be(NUM, 1, 1), be(ICMP_ID, 7, 2), be(ICMP_TYPE, 8, 1), be(ICMP_CODE, 0, 1)),
        ConntrackTuple(1, *V4_TEXT, icmp_id=7, icmp_type=8, icmp_code=0),
    ),
    "icmpv6": (
        way(
            V6, be(NUM, 58, 1), be(ICMPV6_ID, 0, 2), be(ICMPV6_TYPE, 128, 1), be(ICMPV6_CODE, 3, 1)
        ),
        ConntrackTuple(58, *V6_TEXT, icmp_id=0, icmp_type=128, icmp_code=3),
    ),
    "another protocol": (way(V4, be(NUM, 253, 1)), ConntrackTuple(253, *V4_TEXT)),
    "one zone": (
        way(V4, be(NUM, 253, 1)) + be(TUPLE_ZONE, 9, 2),
        ConntrackTuple(253, *V4_TEXT, zone=9),
    ),
    "nothing": (b"", ConntrackTuple()),
}
INFO = struct.pack("!I", 2)


@pytest.mark.parametrize("name", WAYS)
def test_both_ways_are_decoded_whatever_the_protocol(name: str) -> None:
    content, expected = WAYS[name]
    new = ConntrackState.NEW
    assert decode(nest(TUPLE_ORIG, content), INFO) == Conntrack(state=new, original=expected)
    assert decode(nest(TUPLE_REPLY, content), INFO) == Conntrack(state=new, reply=expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            be(STATUS, 0xA, 4),
            Conntrack(status=ConntrackStatus.SEEN_REPLY | ConntrackStatus.CONFIRMED),
        ),
        (be(STATUS, 1 << 15, 4), Conntrack(status=ConntrackStatus.HW_OFFLOAD)),
        (be(TIMEOUT, 431999, 4), Conntrack(timeout=431999)),
        (be(TIMEOUT, 0, 4), Conntrack(timeout=0)),
        (be(MARK, 0xFEDCBA98, 4), Conntrack(mark=0xFEDCBA98)),
        (be(ID, 0, 4), Conntrack(id=0)),
        (be(ID, 0xFFFFFFFF, 4), Conntrack(id=0xFFFFFFFF)),
        (be(ZONE, 65535, 2), Conntrack(zone=65535)),
        (attribute(LABELS, bytes(range(16))), Conntrack(labels=bytes(range(16)))),
        (attribute(LABELS, bytes(15)), Conntrack()),
        (attribute(LABELS, bytes(17)), Conntrack()),
        (attribute(99, b"new"), Conntrack()),
        (b"", Conntrack()),
    ],
)
def test_each_attribute_is_decoded(content: bytes, expected: Conntrack) -> None:
    assert decode(content, None) == expected


@pytest.mark.parametrize(("value", "state"), [(state.value, state) for state in ConntrackState])
def test_states_have_the_kernels_numbers(value: int, state: ConntrackState) -> None:
    names = ["ESTABLISHED", "RELATED", "NEW", "ESTABLISHED_REPLY", "RELATED_REPLY"]
    assert state.name == names[value]
    packet = decode_one(packet_header(), attribute(NFQA.CT, b""), be(NFQA.CT_INFO, value, 4))
    assert packet.conntrack == Conntrack(state=state)


def test_bits_of_the_status_have_the_kernels_names() -> None:
    names = (
        *("EXPECTED", "SEEN_REPLY", "ASSURED", "CONFIRMED", "SRC_NAT", "DST_NAT", "SEQ_ADJUST"),
        *("SRC_NAT_DONE", "DST_NAT_DONE", "DYING", "FIXED_TIMEOUT", "TEMPLATE", "UNTRACKED"),
        *("HELPER", "OFFLOAD", "HW_OFFLOAD"),
    )
    assert {name: 1 << bit for bit, name in enumerate(names)} == {
        status.name: status.value for status in ConntrackStatus
    }


@pytest.mark.parametrize("value", [5, 6, 7, 0xFFFFFFFF])
def test_state_that_is_unknown_is_none(value: int) -> None:
    assert decode(b"", struct.pack("!I", value)).state is None


@pytest.mark.parametrize(
    "content",
    [
        *(
            attribute(kind, bytes(size))
            for kind in (STATUS, TIMEOUT, MARK, ID)
            for size in (0, 3, 5)
        ),
        *(attribute(ZONE, bytes(size)) for size in (0, 1, 3, 4)),
        nest(
            TUPLE_ORIG, nest(TUPLE_IP, attribute(V4_SRC, FROM[:3]), attribute(V6_DST, TO6 + b"1"))
        ),
        nest(TUPLE_REPLY, nest(TUPLE_PROTO, attribute(NUM, b""), attribute(SRC_PORT, b"1"))),
        nest(TUPLE_ORIG, nest(TUPLE_PROTO, attribute(NUM, b"\6", length=6))),
        nest(TUPLE_ORIG, attribute(TUPLE_IP, V4, length=100)),
        nest(TUPLE_ORIG, attribute(TUPLE_ZONE, b"\0")),
        be(MARK, 7, 4)[:7],
    ],
)
def test_what_has_a_wrong_length_counts_as_absent(content: bytes) -> None:
    assert decode(content, None) == Conntrack()


def test_broken_connection_is_counted_and_none() -> None:
    for broken in (b"\1", be(MARK, 7, 4)[:7], attribute(MARK, b"", length=3)):
        packets, tally = packets_from([packet_message(packet_header(), attribute(NFQA.CT, broken))])
        assert [packet.conntrack for packet in packets] == [None]
        assert tally == skipping(broken_attributes=1)


def test_it_cannot_be_changed() -> None:
    found = decode(b"", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.mark = 1  # type: ignore[misc]


ADDRESS = st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(
    # Of some, Python's own text differs from C's.
    lambda address: socket.inet_ntop(socket.AF_INET6, address.packed)
)
PORT = st.none() | st.integers(0, 0xFFFF)
BYTE = st.none() | st.integers(0, 0xFF)
ANY_TUPLE = st.builds(
    ConntrackTuple,
    BYTE,
    st.none() | ADDRESS,
    st.none() | ADDRESS,
    PORT,
    PORT,
    BYTE,
    BYTE,
    PORT,
    PORT,
)
ANY_CONNECTION = st.builds(
    Conntrack,
    st.none() | st.sampled_from(ConntrackState),
    ANY_TUPLE,
    ANY_TUPLE,
    st.integers(0, 0xFFFF).map(ConntrackStatus),
    st.none() | st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFFFFFF),
    st.integers(0, 0xFFFF),
    st.none() | st.integers(0, 0xFFFFFFFF),
    st.none() | st.binary(min_size=16, max_size=16),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(ANY_CONNECTION)
def test_what_was_encoded_is_decoded(connection: Conntrack) -> None:
    info = None if connection.state is None else struct.pack("!I", connection.state.value)
    assert decode(encode(connection), info) == connection


SAMPLE = encode(Conntrack(original=WAYS["tcp"][1], reply=WAYS["icmpv6"][1], labels=bytes(16)))


def mutate(changes: list[tuple[int, int]], end: int) -> bytes:
    mutated = bytearray(SAMPLE)
    for position, value in changes:
        mutated[position] = value
    return bytes(mutated[:end])


MUTATED = st.builds(
    mutate,
    st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=8),
    st.integers(0, len(SAMPLE)),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(MUTATED | st.binary(max_size=80), st.none() | st.binary(max_size=6))
def test_whatever_comes_is_decoded(content: bytes, info: bytes | None) -> None:
    assert isinstance(decode(content, info), Conntrack)


# On the kernel


@pytest.fixture
def connections(
    queue: NetfilterQueue, queue_num: int, rules: Callable[..., Rule]
) -> Callable[..., list[Packet]]:
    """Bind `queue` with conntrack=True to what a match forwards, and return the list of packets
    that will have come; they are accepted."""

    def start(*match: object, ipv6: bool = False, table: str = "filter") -> list[Packet]:
        def keep(packet: Packet) -> None:
            seen.append(packet)
            packet.accept()

        seen: list[Packet] = []
        # The kernel tracks connections while there is a rule that wants to know.
        rules("FORWARD", "-m", "conntrack", "--ctstate", "NEW", ipv6=ipv6)
        rules("FORWARD", *match, queue=queue_num, ipv6=ipv6, table=table)
        queue.bind(queue_num, keep, sock_len=RECEIVE_BUFFER, conntrack=True)
        return seen

    return start


def connection_of(packet: Packet) -> Conntrack:
    assert packet.conntrack is not None
    return packet.conntrack


@pytest.mark.stock_kernel
class TestOnTheKernel:
    @pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
    def test_it_is_that_of_the_packet(
        self,
        queue: NetfilterQueue,
        connections: Callable[..., list[Packet]],
        traffic: Traffic,
        ipv6: bool,
    ) -> None:
        flow = traffic.udp("forward", ipv6=ipv6)
        here, there = (end.getsockname() for end in (flow.sender, flow.receiver))
        seen = connections("-p", "udp", ipv6=ipv6)
        flow.send(b"question")
        run_until(queue, lambda: len(seen) == 1)
        flow.receive()
        flow.receiver.sendto(b"answer", here)
        run_until(queue, lambda: len(seen) == 2)
        flow.sender.recv(100)
        flow.send(b"another")
        run_until(queue, lambda: len(seen) == 3)
        found = [connection_of(packet) for packet in seen]
        assert [one.state for one in found] == [
            ConntrackState.NEW,
            ConntrackState.ESTABLISHED_REPLY,
            ConntrackState.ESTABLISHED,
        ]
        for one in found:
            assert one.original == ConntrackTuple(17, here[0], there[0], here[1], there[1])
            assert one.reply == ConntrackTuple(17, there[0], here[0], there[1], here[1])
            assert one.id is not None
            assert (one.mark, one.zone, one.labels) == (0, 0, None)
        assert len({one.id for one in found}) == 1
        assert not found[0].status & ConntrackStatus.CONFIRMED
        both = ConntrackStatus.CONFIRMED | ConntrackStatus.SEEN_REPLY
        assert found[2].status & both == both
        assert found[2].timeout is not None
        assert 0 < found[2].timeout <= 600

    @pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
    def test_of_pings_it_has_what_tells_them_apart(
        self,
        queue: NetfilterQueue,
        connections: Callable[..., list[Packet]],
        traffic: Traffic,
        ipv6: bool,
    ) -> None:
        ping = traffic.ping("forward", ipv6=ipv6)
        protocol = 58 if ipv6 else 1
        seen = connections("-p", "icmpv6" if ipv6 else "icmp", ipv6=ipv6)
        ping.send(b"ping")
        run_until(queue, lambda: len(seen) == 2)
        request, reply = (connection_of(packet) for packet in seen)
        assert (request.state, reply.state) == (
            ConntrackState.NEW,
            ConntrackState.ESTABLISHED_REPLY,
        )
        for one, kind in ((request.original, ping.request_type), (reply.reply, ping.reply_type)):
            assert (one.protocol, one.icmp_type, one.icmp_code) == (protocol, kind, 0)
            assert one.icmp_id == ping.identifier
            assert (one.source_port, one.destination_port) == (None, None)

    @pytest.mark.parametrize("protocol", ["tcp", "sctp"])
    def test_it_is_established_and_assured_as_it_goes_on(
        self,
        queue: NetfilterQueue,
        connections: Callable[..., list[Packet]],
        traffic: Traffic,
        hosts: tuple[Node, Node],
        protocol: str,
    ) -> None:
        seen = connections("-p", protocol)
        transfer = getattr(traffic, protocol)("forward", b"data")
        run_until(queue, lambda: transfer.done)
        assert transfer.result() == b"data"
        found = [connection_of(packet) for packet in seen]
        number = socket.getprotobyname(protocol)
        left, right = (host.ipv4 for host in hosts)
        port = found[0].original.source_port
        assert port
        for one in found:
            assert one.original == ConntrackTuple(number, left, right, port, transfer.port)
            assert one.reply == ConntrackTuple(number, right, left, transfer.port, port)
        assert found[0].state is ConntrackState.NEW
        assert ConntrackState.ESTABLISHED in {one.state for one in found}
        assert any(one.status & ConntrackStatus.ASSURED for one in found)

    def test_rules_show_in_it(
        self,
        queue: NetfilterQueue,
        connections: Callable[..., list[Packet]],
        traffic: Traffic,
        rules: Callable[..., Rule],
        hosts: tuple[Node, Node],
    ) -> None:
        flow = traffic.udp("forward")
        match = ("-p", "udp", "--dport", flow.port)
        rules("PREROUTING", *match, "-j", "CT", "--zone", 5, table="raw")
        rules("FORWARD", *match, "-j", "CONNMARK", "--set-mark", 0xFEDCBA98, table="mangle")
        rules("FORWARD", *match, "-m", "connlabel", "--label", 17, "--set", table="mangle")
        nowhere = "198.51.100.99"
        rules(
            *("PREROUTING", "-p", "udp", "-d", nowhere, "--dport", flow.port, "-j", "DNAT"),
            *("--to-destination", hosts[1].ipv4),
            table="nat",
        )
        seen = connections(*match)
        with hosts[0].socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"hello", (nowhere, flow.port))
            run_until(queue, lambda: seen)
        found = connection_of(seen[0])
        assert (found.mark, found.zone) == (0xFEDCBA98, 5)
        assert found.labels == (1 << 17).to_bytes(16, "little")
        assert (found.original.destination, found.reply.source) == (nowhere, hosts[1].ipv4)
        assert found.status & ConntrackStatus.DST_NAT

    def test_untracked_packets_have_none(
        self,
        queue: NetfilterQueue,
        connections: Callable[..., list[Packet]],
        traffic: Traffic,
        rules: Callable[..., Rule],
    ) -> None:
        flow = traffic.udp("forward")
        match = ("-p", "udp", "--dport", flow.port)
        rules("PREROUTING", *match, "-j", "CT", "--notrack", table="raw")
        seen = connections(*match)
        flow.send(b"hello")
        run_until(queue, lambda: seen)
        assert seen[0].conntrack is None

    def test_packets_keep_it_when_their_memory_is_used_again(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        connections: Callable[..., list[Packet]],
        traffic: Traffic,
    ) -> None:
        flows = [traffic.udp("forward") for _ in range(20)]
        seen = connections("-p", "udp")
        for _ in range(5):
            for flow in flows:
                flow.send(b"hello")
            count = len(seen) + len(flows)
            run_until(queue, lambda: len(seen) == count)  # noqa: B023 - called before the next
        ports = [connection_of(packet).original.destination_port for packet in seen]
        assert ports == [flow.port for flow in flows] * 5

    def test_marks_and_labels_are_set_with_everything_else(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        count: Callable[..., Callable[[], int]],
    ) -> None:
        def change(packet: Packet) -> None:
            found.append(connection_of(packet))
            if len(found) == 1:
                packet.set_conntrack_mark(0x89ABCDEF)
                packet.set_conntrack_labels(labels)
                packet.set_mark(7)
                packet.set_priority(8)
                packet.set_payload(packet.get_payload()[:-5] + b"HELLO", checksums=True)
            packet.accept()

        found: list[Conntrack] = []
        labels = bytes(range(16))
        flow = traffic.udp("forward")
        match = ("-p", "udp", "--dport", flow.port)
        # With it, connections have room for labels.
        rules("FORWARD", *match, "-m", "connlabel", "--label", 1)
        rules("FORWARD", *match, queue=queue_num)
        marked = ("-m", "connmark", "--mark", 0x89ABCDEF, "-m", "mark", "--mark", 7)
        changed = count("POSTROUTING", *match, *marked, table="mangle")
        queue.bind(queue_num, change, sock_len=RECEIVE_BUFFER, conntrack=True)
        flow.send(b"hello")
        run_until(queue, lambda: len(found) == 1)
        assert flow.receive() == b"HELLO"
        assert changed() == 1
        flow.send(b"hello")
        run_until(queue, lambda: len(found) == 2)
        assert flow.receive() == b"hello"
        assert (found[0].mark, found[0].labels) == (0, None)
        assert (found[1].mark, found[1].labels) == (0x89ABCDEF, labels)

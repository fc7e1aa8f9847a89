"""`set_payload(…, checksums=True)` makes lengths and checksums right: scapy and hosts agree."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import (
    ICMP,
    IP,
    TCP,
    UDP,
    IPOption_LSRR,
    IPOption_NOP,
    IPOption_RR,
    IPOption_SSRR,
    IPOption_Timestamp,
)
from scapy.layers.inet6 import (
    HAO,
    HBHOptUnknown,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    IPv6ExtHdrSegmentRouting,
    Jumbo,
    Pad1,
    PadN,
    RouterAlert,
)
from scapy.layers.l2 import GRE
from scapy.packet import Packet as Layer
from scapy.packet import Raw

from netfilterqueue import Packet
from netfilterqueue.testing import packet as packet_of
from support import CHAINS, RECEIVE_BUFFER, in_thread, internet_checksum, run_until, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue import NetfilterQueue
    from netfilterqueue.testing import Node, Rule
    from support import QueuedUdp, Traffic

both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])


def made_right(payload: bytes) -> bytes:
    """What goes on; the transport layer's checksum was made right too."""
    packet = packet_of(b"original")
    assert packet.set_payload(payload, checksums=True) is True
    return packet.get_payload()


# Generated packets. Lengths and checksums that are not given are computed by scapy; given ones are
# wrong.

NUMBERS = st.integers(0, 0xFFFF)
ADDRESSES = st.ip_addresses(v=4).map(str)
ADDRESSES6 = st.ip_addresses(v=6).map(str)
DATA = st.one_of(
    st.binary(max_size=64),
    st.integers(0, 3000).map(lambda length: b"\xff" * length),
    st.integers(64900, 65000).map(lambda length: b"\xfe" * length),
)

IPV4_OPTIONS = st.lists(
    st.one_of(
        st.just(IPOption_NOP()),
        st.lists(ADDRESSES, min_size=1, max_size=3).map(
            lambda routers: IPOption_RR(routers=routers)
        ),
        st.builds(IPOption_Timestamp, flg=st.just(0)),
    ),
    max_size=2,
)
SOURCE_ROUTES = st.builds(
    lambda kind, routers: [kind(routers=routers)],
    st.sampled_from([IPOption_LSRR, IPOption_SSRR]),
    st.lists(ADDRESSES, min_size=1, max_size=5),
)
IPV6_OPTIONS = st.lists(
    st.one_of(
        st.just(Pad1()),
        st.binary(max_size=20).map(lambda data: PadN(optdata=data)),
        st.builds(RouterAlert),
        st.binary(max_size=20).map(lambda data: HBHOptUnknown(otype=0x1E, optdata=data)),
    ),
    max_size=4,
)
ROUTES6 = st.lists(ADDRESSES6, min_size=1, max_size=4)
EXTENSIONS = st.one_of(
    IPV6_OPTIONS.map(lambda options: IPv6ExtHdrHopByHop(options=options)),
    IPV6_OPTIONS.map(lambda options: IPv6ExtHdrDestOpt(options=options)),
    # A fragment without others.
    st.integers(0, 0xFFFFFFFF).map(lambda id: IPv6ExtHdrFragment(id=id)),
    # At its goal: the address in the IP header counts.
    ROUTES6.map(lambda route: IPv6ExtHdrRouting(addresses=route, segleft=0)),
)
# At most one of them: scapy looks at the first only.
ROUTES_AND_HOMES = st.one_of(
    ROUTES6.map(lambda route: IPv6ExtHdrRouting(addresses=route)),
    ROUTES6.map(lambda route: IPv6ExtHdrSegmentRouting(addresses=route, segleft=len(route))),
    ADDRESSES6.map(lambda home: IPv6ExtHdrDestOpt(options=[HAO(hoa=home)])),
)
TCP_OPTIONS = st.sampled_from(
    [[], [("MSS", 1460)], [("Timestamp", (1, 2))], [("NOP", None), ("SAck", (1, 2, 3, 4))]]
)


class Template(NamedTuple):
    """Layers, as functions of whether their lengths and checksums are to be right."""

    layers: tuple[Callable[[bool], Layer], ...]

    def build(self, *, right: bool) -> bytes:
        whole, *rest = (layer(right) for layer in self.layers)
        for layer in rest:
            whole /= layer
        return bytes(whole)


def layer(
    kind: Callable[..., Layer], fields: dict[str, Any], wrong: dict[str, int]
) -> Callable[[bool], Layer]:
    return lambda right: kind(**fields, **({} if right else wrong))


def layers(kind: type[Layer], wrong: dict[str, st.SearchStrategy[int]], **fields: Any) -> Any:
    """A layer of random fields, `wrong` those that can be right or wrong."""
    return st.builds(
        layer, st.just(kind), st.fixed_dictionaries(fields), st.fixed_dictionaries(wrong)
    )


CHECKSUM = {"chksum": st.integers(1, 0xFFFF)}  # 0 in UDP has a meaning
TRANSPORTS = st.one_of(
    layers(TCP, CHECKSUM, sport=NUMBERS, dport=NUMBERS, seq=NUMBERS, options=TCP_OPTIONS),
    layers(UDP, {"len": NUMBERS, **CHECKSUM}, sport=NUMBERS, dport=NUMBERS),
)
PLAIN = st.builds(lambda data: lambda right: Raw(data), DATA)
IPV4 = st.builds(
    lambda *layers: Template(layers),
    layers(
        IP,
        {"len": NUMBERS, "chksum": NUMBERS},
        src=ADDRESSES,
        dst=ADDRESSES,
        options=IPV4_OPTIONS | SOURCE_ROUTES,
    ),
    TRANSPORTS | layers(ICMP, CHECKSUM, id=NUMBERS, seq=NUMBERS),
    PLAIN,
)
IPV6 = st.builds(
    lambda ip, extensions, special, *rest: Template(
        (ip, *(lambda right, one=one: one for one in (*extensions, *special)), *rest)
    ),
    layers(IPv6, {"plen": NUMBERS}, src=ADDRESSES6, dst=ADDRESSES6),
    st.lists(EXTENSIONS, max_size=3),
    st.lists(ROUTES_AND_HOMES, max_size=1),
    TRANSPORTS | layers(ICMPv6EchoRequest, {"cksum": NUMBERS}, id=NUMBERS, seq=NUMBERS),
    PLAIN,
)


class TestAgainstScapy:
    @settings(derandomize=True, database=None, deadline=None, max_examples=300)
    @given(IPV4 | IPV6)
    def test_any_packet_becomes_as_scapy_builds_it(self, template: Template) -> None:
        assert made_right(template.build(right=False)) == template.build(right=True)

    @settings(derandomize=True, database=None, deadline=None, max_examples=100)
    @given(IPV4 | IPV6, st.binary(max_size=100))
    def test_lengths_follow_the_payload_given(self, template: Template, more: bytes) -> None:
        """What a program appends or cuts off: the headers still tell the length from before."""
        longer = Template((*template.layers, lambda right: Raw(more)))
        assert made_right(template.build(right=True) + more) == longer.build(right=True)


def udp_with_sum(wanted: int, *, ipv6: bool) -> Layer:
    """A UDP packet whose right checksum is this, or 0xFFFF for 0."""
    network = IPv6(src="2001:db8::1", dst="2001:db8::2") if ipv6 else IP(src="192.0.2.1")
    empty = bytes(network / UDP(sport=1, dport=2) / bytes(2))
    (found,) = struct.unpack_from("!H", empty, len(empty) - 4)
    # In ones' complement, by which the sum of all is the negative of the checksum.
    missing = (found - wanted) % 0xFFFF
    return network / UDP(sport=1, dport=2) / struct.pack("!H", missing)


class TestProtocols:
    @both_families
    def test_udp_checksum_that_adds_up_to_0_is_sent_as_65535(self, ipv6: bool) -> None:
        right = udp_with_sum(0, ipv6=ipv6)
        wrong = right.copy()
        wrong[UDP].chksum = 0x1234
        assert made_right(bytes(wrong)) == bytes(right)
        assert bytes(right)[-4:-2] == b"\xff\xff"

    def test_udp_without_a_checksum_stays_so_in_ipv4(self) -> None:
        without = IP(src="192.0.2.1", dst="192.0.2.2") / UDP(chksum=0) / b"data"
        wrong = without.copy()
        wrong[UDP].len = 99
        wrong[IP].chksum = 99
        assert made_right(bytes(wrong)) == bytes(without)

    def test_udp_without_a_checksum_gets_one_in_ipv6(self) -> None:
        packet = IPv6(src="2001:db8::1", dst="2001:db8::2") / UDP(chksum=0) / b"data"
        right = packet.copy()
        del right[UDP].chksum
        assert made_right(bytes(packet)) == bytes(right)

    def test_neighbour_discovery_is_icmpv6_too(self) -> None:
        right = IPv6(src="fe80::1", dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt="fe80::2")
        wrong = right.copy()
        wrong[ICMPv6ND_NS].cksum = 1
        assert made_right(bytes(wrong)) == bytes(right)

    @pytest.mark.parametrize("kind", [IPOption_LSRR, IPOption_SSRR])
    def test_source_route_that_is_used_up_has_the_goal_in_the_header(
        self, kind: type[Layer]
    ) -> None:
        plain = IP(src="192.0.2.1", dst="192.0.2.2") / TCP()
        routed = IP(src="192.0.2.1", dst="192.0.2.2") / TCP()
        routed[IP].options = [kind(routers=["203.0.113.1"], pointer=8), IPOption_NOP()]
        payload = made_right(bytes(routed))
        assert payload[28 + 16 : 28 + 18] == bytes(plain)[20 + 16 : 20 + 18]

    @pytest.mark.parametrize(
        "layer",
        [
            IP() / GRE() / IP() / UDP(chksum=1),
            IP(proto=132) / bytes(20),
            IP(proto=socket.IPPROTO_ICMPV6) / bytes(20),
            IP(proto=253),
            IPv6() / GRE() / IP() / UDP(chksum=1),
            IPv6(nh=59),
            IPv6(nh=socket.IPPROTO_ICMP) / bytes(20),
            IPv6(nh=253) / b"x",
        ],
        ids=lambda layer: layer.summary(),
    )
    def test_of_another_protocol_only_the_ip_header_is_made_right(self, layer: Layer) -> None:
        wrong = layer.copy()
        if IPv6 in layer:
            wrong[IPv6].plen = 7
        else:
            wrong[IP].len = wrong[IP].chksum = 7
        packet = packet_of(b"original")
        assert packet.set_payload(bytes(wrong), checksums=True) is False
        assert packet.get_payload() == bytes(layer)

    @pytest.mark.parametrize(
        "layer",
        [
            IP(flags="MF") / UDP(len=200, chksum=1) / b"first",
            IP(frag=3) / b"later",
            IP(frag=3, flags="MF", proto=socket.IPPROTO_TCP) / b"x",
            IPv6() / IPv6ExtHdrFragment(m=1) / UDP(len=200, chksum=1) / b"first",
            IPv6() / IPv6ExtHdrFragment(offset=3, nh=socket.IPPROTO_UDP) / b"x",
            # No destination options: the middle of data.
            IPv6() / IPv6ExtHdrFragment(offset=3, nh=socket.IPPROTO_DSTOPTS) / b"\x00\xff",
            IPv6() / IPv6ExtHdrRouting(type=3, addresses=["::1"]) / UDP(len=200, chksum=1),
            IPv6() / IPv6ExtHdrRouting(type=0, len=0, segleft=1) / UDP(len=200, chksum=1),
        ],
        ids=lambda layer: layer.summary(),
    )
    def test_of_a_fragment_only_the_ip_header_is_made_right(self, layer: Layer) -> None:
        """Nor where the goal is not known, which the checksum covers."""
        self.test_of_another_protocol_only_the_ip_header_is_made_right(layer)


class TestArguments:
    @pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
    def test_bytes_of_the_caller_are_left_alone(self, form: Callable[[bytes], Any]) -> None:
        wrong = bytes(IP(len=0, chksum=0) / TCP(chksum=0) / b"data")
        before = bytearray(wrong)
        given = form(wrong)
        assert made_right(given) != wrong
        assert given == before
        assert wrong == before

    def test_without_it_the_payload_is_taken_as_it_is(self) -> None:
        packet = packet_of(b"original")
        wrong = bytes(IP(len=0, chksum=0) / TCP(chksum=0))
        assert packet.set_payload(wrong) is False
        assert packet.get_payload() is wrong

    def test_none_takes_the_payload_back(self) -> None:
        packet = packet_of(b"original")
        packet.set_payload(bytes(IP() / TCP()), checksums=True)
        assert packet.set_payload(None, checksums=True) is False
        assert packet.get_payload() == b"original"


def hop_by_hop(option: bytes) -> bytes:
    return bytes(IPv6(nh=0) / (b"\x11\x00" + option.ljust(6, b"\0")) / UDP())


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty of both": (b"\0", "neither IPv4 nor IPv6"),
    "ARP": (bytes.fromhex("0001080006040001") + bytes(20), "neither IPv4 nor IPv6"),
    "one byte": (b"\x45", "IPv4 header has at least 20 bytes, and only 1 are there"),
    "IPv4 cut": (bytes(IP())[:19], "IPv4 header has at least 20 bytes, and only 19 are there"),
    "IPv4 header too short": (bytes(IP(ihl=4) / TCP()), "claims 16 bytes instead of 20 to 40"),
    "IPv4 header too long": (bytes(IP(ihl=15)), "claims 60 bytes instead of 20 to 20"),
    "IPv4 option without length": (
        bytes(IP(ihl=6)) + b"\1\1\1\7",
        "option at byte 23 has no length",
    ),
    "IPv4 option too short": (bytes(IP(ihl=6)) + b"\7\1\1\1", "option at byte 20 has no length"),
    "IPv4 option too long": (bytes(IP(ihl=6)) + b"\7\5\4\0", "option at byte 20 has no length"),
    "IPv6 cut": (bytes(IPv6())[:39], "IPv6 header has 40 bytes, and only 39 are there"),
    "extension missing": (bytes(IPv6(nh=60)), "at byte 40 claims 2 bytes, and only 0 are there"),
    "extension cut": (bytes(IPv6(nh=60)) + b"\6", "claims 2 bytes, and only 1 are there"),
    "extension too long": (
        bytes(IPv6(nh=43)) + b"\6\1" + bytes(13),
        "at byte 40 claims 16 bytes, and only 15 are there",
    ),
    "fragment header cut": (bytes(IPv6(nh=44)) + bytes(7), "claims 8 bytes, and only 7"),
    "authentication cut": (
        bytes(IPv6(nh=51)) + b"\6\4" + bytes(20),
        "claims 24 bytes, and only 22",
    ),
    "IPv6 option without length": (
        hop_by_hop(b"\0\0\0\0\0\5"),
        "IPv6 extension headers has no length that fits",
    ),
    "IPv6 option too long": (
        hop_by_hop(b"\5\5"),
        "IPv6 extension headers has no length that fits",
    ),
    "jumbogram": (
        bytes(IPv6() / IPv6ExtHdrHopByHop(options=[Jumbo(jumboplen=70000)]) / UDP()),
        "jumbogram",
    ),
    "TCP cut": (bytes(IP() / TCP())[:-1], "TCP header has 20 bytes, and only 19 are there"),
    "TCP header too short": (bytes(IP() / TCP(dataofs=4)), "TCP header claims 16 bytes"),
    "TCP header too long": (
        bytes(IPv6() / TCP(dataofs=6)) + b"abc",
        "TCP header has 24 bytes, and only 23 are there",
    ),
    "UDP cut": (bytes(IP() / UDP())[:-1], "UDP header has 8 bytes, and only 7 are there"),
    "ICMP cut": (bytes(IP() / ICMP())[:-1], "ICMP header has 8 bytes, and only 7 are there"),
    "ICMPv6 cut": (
        bytes(IPv6() / ICMPv6EchoRequest())[:-1],
        "IPv6-ICMP header has 8 bytes, and only 7 are there",
    ),
}


class TestMalformed:
    @pytest.mark.parametrize("name", MALFORMED)
    def test_value_error_says_what_is_wrong(self, name: str) -> None:
        payload, complaint = MALFORMED[name]
        packet = packet_of(b"original")
        packet.set_payload(b"earlier")
        with pytest.raises(ValueError, match=f"{complaint}.*checksums=False"):
            packet.set_payload(payload, checksums=True)
        assert packet.get_payload() == b"earlier"

    @settings(derandomize=True, database=None, deadline=None, max_examples=500)
    @given(st.data())
    def test_any_bytes_are_made_right_or_refused(self, data: st.DataObject) -> None:
        """Broken on purpose: in a build with sanitizers, no byte outside is touched."""
        payload = bytearray(data.draw(IPV4 | IPV6).build(right=True)[:300])
        for at in data.draw(st.lists(st.integers(0, len(payload) - 1), max_size=4)):
            payload[at] = data.draw(st.integers(0, 255))
        del payload[data.draw(st.integers(1, len(payload))) :]
        packet = packet_of(b"original")
        try:
            packet.set_payload(payload, checksums=True)
        except ValueError:
            return
        again = packet.get_payload()
        assert len(again) == len(payload)
        packet.set_payload(again, checksums=True)
        assert packet.get_payload() == again


class Counters:
    """What a host has received and refused for its checksum, since this was made."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.before = self.read()

    def read(self) -> dict[str, int]:
        found: dict[str, int] = {}
        lines = Path(f"/proc/{self.node.pid}/net/snmp").read_text(encoding="ascii").splitlines()
        for names, numbers in zip(lines[::2], lines[1::2]):
            kind, *fields = names.split()
            found.update(
                zip((kind[:-1] + field for field in fields), map(int, numbers.split()[1:]))
            )
        lines = Path(f"/proc/{self.node.pid}/net/snmp6").read_text(encoding="ascii").splitlines()
        found.update((name, int(number)) for name, number in map(str.split, lines))
        return {name: n for name, n in found.items() if "InCsumErrors" in name}

    @property
    def refused(self) -> dict[str, int]:
        return {
            name: n - self.before[name] for name, n in self.read().items() if n != self.before[name]
        }


def replaced(packet: Packet, old: bytes, new: bytes) -> None:
    assert packet.set_payload(packet.get_payload().replace(old, new), checksums=True)
    packet.accept()


def tcp_data_offset(payload: bytes) -> int:
    """Where the data of a TCP packet without IP options or extension headers begins."""
    tcp = 20 if payload[0] >> 4 == 4 else 40
    return tcp + 4 * (payload[tcp + 12] >> 4)


def pad_options(packet: Packet) -> None:
    """Make a TCP header longer by four bytes that mean nothing."""
    payload = bytearray(packet.get_payload())
    tcp = 40 if payload[0] >> 4 == 6 else 20
    size = 4 * (payload[tcp + 12] >> 4)
    if size < 60:
        payload[tcp + 12] += 1 << 4
        payload[tcp + size : tcp + size] = b"\1\1\1\1"
    assert packet.set_payload(payload, checksums=True)
    packet.accept()


def unfinished(packet: Layer) -> bytes:
    """A UDP packet as its sender leaves it to the network card, with the pseudo-header's sum: what
    is missing where the checksum is right."""
    payload = bytes(packet)
    udp = payload[-len(packet[UDP]) :]
    start = len(payload) - len(udp) + 6
    pseudo_sum = internet_checksum(udp + bytes(len(udp) % 2))
    return payload[:start] + struct.pack("!H", pseudo_sum) + payload[start + 2 :]


class TestUnfinished:
    """Packets of a queue with the flag gso, whose checksums and segments are left to others."""

    def test_udp_checksum_of_0_is_no_sign_then_that_there_is_none(self) -> None:
        packet = packet_of(unfinished(IP() / UDP() / b"original"), checksum_ready=False)
        right = IP(src="192.0.2.1", dst="192.0.2.2") / UDP() / b"data"
        wrong = right.copy()
        wrong[UDP].chksum = 0
        assert packet.set_payload(bytes(wrong), checksums=True) is True
        assert packet.get_payload() == bytes(right)

    @pytest.mark.parametrize(
        "network",
        [
            IP(),
            IP(src="192.0.2.1", options=[IPOption_LSRR(routers=["192.0.2.7"])]),
            IPv6(),
            IPv6() / IPv6ExtHdrRouting(addresses=["2001:db8::7"]),
            # The pseudo-header's sum is 0xFFFF, or 0.
            IP(src="0.0.0.0", dst="255.221.0.0"),
        ],
    )
    def test_udp_is_finished_where_the_pseudo_headers_sum_stands_there(
        self, network: Layer
    ) -> None:
        right = network / UDP() / b"payload!!"
        payload = unfinished(right)
        packet = packet_of(payload, checksum_ready=False)
        assert packet.set_payload(payload, checksums=True) is True
        assert packet.get_payload() == bytes(right)
        # Its own is finished already.
        packet = packet_of(bytes(right), checksum_ready=False)
        with pytest.raises(ValueError, match=r"unfinished.*inside.*bind without gso=True"):
            packet.set_payload(payload, checksums=True)

    @pytest.mark.parametrize(
        "network",
        [
            IP(flags="MF", proto=17),
            IPv6() / IPv6ExtHdrFragment(m=1, nh=17),
            IPv6() / IPv6ExtHdrRouting(type=9, segleft=1, nh=17),
        ],
        ids=["IPv4 fragment", "IPv6 fragment", "unknown route"],
    )
    def test_udp_is_not_finished_where_its_header_need_not_have_come(self, network: Layer) -> None:
        packet = packet_of(bytes(network), checksum_ready=False)
        with pytest.raises(ValueError, match=r"unfinished.*of a kind.*bind without gso=True"):
            packet.set_payload(bytes(IP() / UDP()), checksums=True)

    def test_udp_is_not_finished_where_nothing_tells_whose_checksum_it_is(self) -> None:
        packet = packet_of(None, checksum_ready=False)
        with pytest.raises(ValueError, match=r"unfinished.*retain\(\).*bind without gso=True"):
            packet.set_payload(bytes(IP() / UDP()), checksums=True)
        assert packet.set_payload(bytes(IP() / TCP()), checksums=True)

    def test_what_retain_kept_of_a_new_payload_does_not_tell(self) -> None:
        original = unfinished(IP() / UDP() / b"original")
        packet = packet_of(original, checksum_ready=False)
        packet.retain()
        packet.set_payload(original)
        assert packet.set_payload(original, checksums=True)
        packet.retain()
        with pytest.raises(ValueError, match=r"unfinished.*retain\(\).*bind without gso=True"):
            packet.set_payload(original, checksums=True)

    @pytest.mark.parametrize(
        "layer", [IP(proto=132) / bytes(20), IP(flags="MF") / UDP()], ids=["SCTP", "fragment"]
    )
    def test_checksum_that_cannot_be_finished_is_an_error(self, layer: Layer) -> None:
        packet = packet_of(b"original", checksum_ready=False)
        with pytest.raises(ValueError, match=r"unfinished.*bind without gso=True"):
            packet.set_payload(bytes(layer), checksums=True)
        assert packet.get_payload() == b"original"

    @pytest.mark.parametrize("checksums", [False, True])
    @pytest.mark.parametrize(
        "network",
        [IP(), IPv6(), IPv6() / IPv6ExtHdrHopByHop()],
        ids=["ipv4", "ipv6", "behind an extension header"],
    )
    def test_segments_stay_tcp_of_the_same_length(self, network: Layer, checksums: bool) -> None:
        original = bytes(network / TCP() / bytes(1000))
        packet = packet_of(original, gso=True)
        same = bytes(network / TCP() / (b"x" * 1000))
        packet.set_payload(same, checksums=checksums)
        assert packet.get_payload() == same
        for wrong in (
            bytes(network / TCP() / bytes(999)),
            bytes(network / TCP() / bytes(1001)),
            bytes(network / UDP() / bytes(1012)),
            bytes(len(original)),
        ):
            with pytest.raises(ValueError, match=rf"several segments.*{len(original)} bytes"):
                packet.set_payload(wrong, checksums=checksums)
        assert packet.get_payload() == same

    def test_segments_of_udp_are_not_changed(self) -> None:
        original = bytes(IP() / UDP() / bytes(1000))
        with pytest.raises(ValueError, match="several segments"):
            packet_of(original, gso=True).set_payload(original, checksums=True)

    def test_segments_of_a_packet_that_was_cut_short_are_not_changed(self) -> None:
        original = bytes(IP() / TCP() / bytes(1000))
        packet = packet_of(original, gso=True, original_len=65535)
        with pytest.raises(ValueError, match=r"several segments.*65535 bytes"):
            packet.set_payload(original, truncate=True)


class TestReceivingHost:
    @both_families
    @pytest.mark.parametrize("path", ["loopback", "input", "forward", "output"])
    @pytest.mark.parametrize("data", [b"", b"odd", b"even", b"long" * 300, b"odd" * 401])
    def test_udp_of_another_length_arrives(
        self,
        queued_udp: Callable[..., QueuedUdp],
        traffic: Traffic,
        router: Node,
        hosts: tuple[Node, Node],
        path: str,
        ipv6: bool,
        data: bytes,
    ) -> None:
        counters = Counters(router if path in ("loopback", "input") else hosts[1])
        queued = queued_udp(path, lambda packet: replaced(packet, b"hello", data), ipv6=ipv6)
        queued.deliver_one(b"hello")
        assert queued.flow.receive() == data
        assert counters.refused == {}

    def test_host_counts_wrong_checksums(
        self, queued_udp: Callable[..., QueuedUdp], traffic: Traffic, router: Node
    ) -> None:
        """What the other tests rely on."""

        def callback(packet: Packet) -> None:
            packet.set_payload(packet.get_payload().replace(b"hello", b"other"))
            packet.accept()

        counters = Counters(router)
        queued = queued_udp("input", callback)
        queued.deliver_one(b"hello")
        wait_until(lambda: counters.refused)
        assert counters.refused == {"UdpInCsumErrors": 1}

    @both_families
    @pytest.mark.parametrize("path", ["loopback", "input"])
    def test_tcp_with_longer_headers_and_other_data_arrives(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        rules: Callable[..., Rule],
        traffic: Traffic,
        router: Node,
        path: str,
        ipv6: bool,
    ) -> None:
        data = bytes(range(251)) * 400
        queue.bind(queue_num, pad_options, sock_len=RECEIVE_BUFFER)
        counters = Counters(router)
        transfer = traffic.tcp(path, data, ipv6=ipv6)
        rules("INPUT", "-p", "tcp", queue=queue_num, ipv6=ipv6)
        run_until(queue, lambda: transfer.done)
        assert transfer.result() == data
        assert counters.refused == {}

    @both_families
    @pytest.mark.parametrize("path", ["input", "forward", "output"])
    def test_tcp_that_is_not_segmented_yet_arrives_changed(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        rules: Callable[..., Rule],
        traffic: Traffic,
        router: Node,
        hosts: tuple[Node, Node],
        path: str,
        ipv6: bool,
    ) -> None:
        unready = []

        def callback(packet: Packet) -> None:
            if packet.gso:
                unready.append(packet.checksum_ready)
            payload = packet.get_payload()
            # Not in the headers: a sequence number can have these bytes too.
            start = tcp_data_offset(payload)
            changed = payload[:start] + payload[start:].replace(b"h", b"H")
            assert packet.set_payload(changed, checksums=True)
            packet.accept()

        queue.bind(queue_num, callback, gso=True, sock_len=RECEIVE_BUFFER)
        counters = Counters(router if path == "input" else hosts[1])
        rules(CHAINS[path], "-p", "tcp", queue=queue_num, ipv6=ipv6)
        transfer = traffic.tcp(path, b"hello" * 40000, ipv6=ipv6)
        run_until(queue, lambda: transfer.done)
        # In two steps, as to show how long texts differ takes pytest minutes.
        intact = transfer.result() == b"Hello" * 40000
        assert intact
        assert False in unready
        assert counters.refused == {}

    @both_families
    @pytest.mark.parametrize("data", [b"", b"odd", b"long" * 300])
    def test_udp_whose_checksum_is_unfinished_arrives_with_another_length(
        self,
        queued_udp: Callable[..., QueuedUdp],
        hosts: tuple[Node, Node],
        ipv6: bool,
        data: bytes,
    ) -> None:
        unready = []

        def callback(packet: Packet) -> None:
            unready.append(packet.checksum_ready)
            replaced(packet, b"hello", data)

        counters = Counters(hosts[1])
        queued = queued_udp("output", callback, ipv6=ipv6, gso=True)
        queued.deliver_one(b"hello")
        assert queued.flow.receive() == data
        assert unready == [False]
        assert counters.refused == {}

    @both_families
    def test_ping_of_another_length_arrives(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        rules: Callable[..., Rule],
        traffic: Traffic,
        hosts: tuple[Node, Node],
        ipv6: bool,
    ) -> None:
        queue.bind(
            queue_num, lambda p: replaced(p, b"ping", b"a longer one"), sock_len=RECEIVE_BUFFER
        )
        counters = Counters(hosts[1])
        ping = traffic.ping("forward", ipv6=ipv6)
        kind = ("icmpv6", "--icmpv6-type") if ipv6 else ("icmp", "--icmp-type")
        rules("FORWARD", "-p", kind[0], kind[1], "echo-request", queue=queue_num, ipv6=ipv6)
        reply = in_thread(ping.receive)
        ping.send(b"ping")
        run_until(queue, reply.done)
        assert reply.result() == b"a longer one"
        assert counters.refused == {}

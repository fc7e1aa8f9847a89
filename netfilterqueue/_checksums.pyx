"""IP packets: what they carry, and their lengths and checksums made right.

Pure functions on memory. A packet is whatever a program says that it is, so every header is
measured before it is read or written.

libnetfilter_queue 1.0.5 computes the checksums of IPv4 headers, of TCP and of UDP. It is right but
for three things, which are seen to here: UDP sends 0xFFFF for a sum of 0, for which 0 would mean
"none"; a packet on a source route counts with its final destination; and a packet whose header
claims more bytes than are there is read beyond its end. It has nothing for ICMP.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memmove

from netfilterqueue._netlink cimport read_be16
from netfilterqueue._nfqueue cimport MAX_PAYLOAD, PacketFields, is_truncated, original_length
from netfilterqueue._uapi cimport (
    IP6OPT_JUMBO, IP6OPT_PAD1, IP_MF, IP_OFFMASK, IPOPT_END, IPOPT_LSRR, IPOPT_NOOP, IPOPT_SSRR,
    IPPROTO_AH, IPPROTO_DSTOPTS, IPPROTO_FRAGMENT, IPPROTO_HOPOPTS, IPPROTO_ICMP, IPPROTO_ICMPV6,
    IPPROTO_MH, IPPROTO_ROUTING, IPPROTO_TCP, IPPROTO_UDP, NFQA_SKB_GSO, htonl, htons, icmphdr,
    ip6_hdr, iphdr, nfq_ip_set_checksum, nfq_tcp_compute_checksum_ipv4,
    nfq_tcp_compute_checksum_ipv6, nfq_udp_compute_checksum_ipv4, nfq_udp_compute_checksum_ipv6,
    tcphdr, udphdr,
)

from netfilterqueue.constants import PROTOCOLS

# What the headers of the C library have no names for.
cdef enum:
    # Extension headers: host identity (RFC 7401), shim6 (RFC 5533).
    IPPROTO_HIP = 139
    IPPROTO_SHIM6 = 140
    # An option of the destination options header (RFC 6275 section 6.3).
    HOME_ADDRESS = 201
    # Types of the routing header: source route (RFC 2460 section 4.4), the same with one address
    # (RFC 6275 section 6.4), segment list (RFC 8754).
    SOURCE_ROUTE = 0
    HOME_ROUTE = 2
    SEGMENT_LIST = 4
    # A fragment's offset and whether more follow, in the fragment header (RFC 8200 section 4.5).
    FRAGMENTED = 0xFFF9


cdef struct Transport:
    int protocol                    # what the IP packet carries
    Py_ssize_t offset               # where that begins in the packet
    # The addresses of the pseudo-header: the IP header's, but for mobile hosts and source routes.
    const uint8_t *source
    const uint8_t *destination
    bint whole                      # its checksum covers nothing that is not in this packet


cdef int protocol_of(bytes packet) noexcept:
    """The number of the protocol that an IPv4 or IPv6 packet carries; -1 where it does not tell."""
    return upper_protocol(<const uint8_t *> PyBytes_AS_STRING(packet), PyBytes_GET_SIZE(packet))


cdef int upper_protocol(const uint8_t *packet, Py_ssize_t length) noexcept nogil:
    """The number of the protocol that an IPv4 or IPv6 packet carries, as far as a part of it tells;
    -1 where it does not."""
    cdef Py_ssize_t offset = sizeof(ip6_hdr)
    cdef Py_ssize_t size
    cdef int protocol
    if length >= 10 and packet[0] >> 4 == 4:
        return packet[9]
    if length < 7 or packet[0] >> 4 != 6:
        return -1
    protocol = packet[6]
    while is_extension(protocol) and offset + 2 <= length:
        size = extension_size(protocol, packet + offset)
        protocol = packet[offset]
        offset += size
    return protocol


cdef bint is_extension(int protocol) noexcept nogil:
    """Whether it is an IPv6 extension header (RFC 8200 section 4)."""
    return protocol in (IPPROTO_HOPOPTS, IPPROTO_ROUTING, IPPROTO_FRAGMENT, IPPROTO_AH,
                        IPPROTO_DSTOPTS, IPPROTO_MH, IPPROTO_HIP, IPPROTO_SHIM6)


cdef Py_ssize_t extension_size(int protocol, const uint8_t *header) noexcept nogil:
    """How many bytes an extension header claims, by the first two of them."""
    if protocol == IPPROTO_FRAGMENT:
        return 8
    if protocol == IPPROTO_AH:
        return 4 * (header[1] + 2)
    return 8 * (header[1] + 1)


cdef int require_fit(bytes packet, const PacketFields *fields, bint truncate) except -1:
    """Raise if this cannot take the place of what came, which may be shortened to the part that
    was copied of it if ``truncate``."""
    if not 1 <= len(packet) <= MAX_PAYLOAD:
        raise ValueError(f"a payload of {len(packet)} bytes cannot be set: "
                         f"it must have 1 to {MAX_PAYLOAD}; use drop() to discard a packet")
    if is_truncated(fields) and not truncate:
        raise RuntimeError(
            f"only {fields.payload_length} of this packet's {original_length(fields)} bytes are "
            "here, and with a new payload it would lose the others: bind with a larger range, or "
            "pass truncate=True if it may")
    if fields.skb_info & NFQA_SKB_GSO:
        require_same_segments(packet, original_length(fields))
    return 0


cdef int require_same_segments(bytes packet, Py_ssize_t length) except -1:
    """Raise if this cannot take the place of a packet of so many bytes that stands for several.

    The kernel has noted where it will cut the packet, and how: of TCP it makes every segment's
    checksum anew, wherever the packet goes. Of UDP it wants the pseudo-header's sum where it cuts,
    and a right checksum where it delivers the packet as a whole, and nobody knows which it will be.
    """
    if len(packet) != length or protocol_of(packet) != IPPROTO_TCP:
        raise ValueError(
            f"this packet stands for several segments (gso), and {len(packet)} bytes cannot take "
            f"its place: it must stay TCP, of {length} bytes; or bind without gso=True")
    return 0


cdef bytes with_checksums(bytes packet, bytes unfinished, bint *whole):
    """A copy of an IPv4 or IPv6 packet, of at most 65535 bytes, with its lengths and checksums set.

    ``whole`` becomes False where only the IP header could be made right: in a fragment, on a source
    route of unknown kind, for a protocol other than TCP, UDP, ICMP and ICMPv6. ``unfinished``: what
    came, empty where it is gone, if its checksum was left to the network card, so that 0 in UDP
    does not mean that there is none; else None. Raises ValueError where a header is malformed, and
    where a checksum would stay unfinished.
    """
    cdef bytes copy = PyBytes_FromStringAndSize(PyBytes_AS_STRING(packet), PyBytes_GET_SIZE(packet))
    whole[0] = make_right(<uint8_t *> PyBytes_AS_STRING(copy), PyBytes_GET_SIZE(copy),
                          unfinished is not None)
    if unfinished is not None:
        if not whole[0]:
            raise cannot_finish(OTHER_KIND)
        if protocol_of(copy) == IPPROTO_UDP:
            require_own_sum(<const uint8_t *> PyBytes_AS_STRING(unfinished),
                            PyBytes_GET_SIZE(unfinished))
    return copy


# Why a checksum stays unfinished.
cdef str OTHER_KIND = "of a kind that cannot be finished here"


cdef int require_own_sum(const uint8_t *packet, Py_ssize_t length) except -1:
    """Raise if the unfinished checksum of a packet is not, or may not be, that of its UDP header:
    then the pseudo-header's sum stands there. In a tunnel it is that of a packet inside."""
    cdef Transport transport
    cdef Py_ssize_t size
    cdef uint64_t expected
    cdef const udphdr *header
    if not length:
        raise cannot_finish("the bytes that tell whose it is are gone, unless you call retain()")
    if upper_protocol(packet, length) != IPPROTO_UDP:
        return 0
    if packet[0] >> 4 == 4:
        size = 4
        walk_ipv4(packet, length, &transport)
    else:
        size = 16
        walk_ipv6(packet, length, &transport)
    # Its header need not be there.
    if not transport.whole:
        raise cannot_finish(OTHER_KIND)
    require_header(packet, length, &transport)
    header = <const udphdr *> (packet + transport.offset)
    expected = (sum_of(transport.source, size) + sum_of(transport.destination, size)
                + header.len + htonl(IPPROTO_UDP))
    # The kernel's sum may be folded in another way: 0xFFFF is 0.
    if expected % 0xFFFF != header.check % 0xFFFF:
        raise cannot_finish("that of a packet inside of it, as in a tunnel")
    return 0


cdef cannot_finish(str why):
    return ValueError(f"the checksum of this packet is unfinished, and {why}: bind without "
                      "gso=True, and the kernel finishes it")


cdef bint make_right(uint8_t *packet, Py_ssize_t length, bint unfinished) except -1:
    """Nothing is written unless all headers fit: a bytes object of one byte is shared by all."""
    cdef Transport transport
    if length and packet[0] >> 4 == 4:
        walk_ipv4(packet, length, &transport)
        require_header(packet, length, &transport)
        (<iphdr *> packet).tot_len = htons(<uint16_t> length)
        nfq_ip_set_checksum(<iphdr *> packet)
    elif length and packet[0] >> 4 == 6:
        walk_ipv6(packet, length, &transport)
        require_header(packet, length, &transport)
        (<ip6_hdr *> packet).ip6_plen = htons(<uint16_t> (length - sizeof(ip6_hdr)))
    else:
        raise malformed("it is neither IPv4 nor IPv6")
    return transport.whole and set_checksum(packet, length, &transport, unfinished)


# Finding what IP carries.

cdef int walk_ipv4(const uint8_t *packet, Py_ssize_t length, Transport *found) except -1:
    cdef Py_ssize_t size = 4 * (packet[0] & 0xF)
    cdef Py_ssize_t at = sizeof(iphdr)
    if length < at:
        raise malformed(f"an IPv4 header has at least {at} bytes, and only {length} are there")
    if not at <= size <= length:
        raise malformed(f"its IPv4 header claims {size} bytes instead of {at} to {length}")
    found.protocol = packet[9]
    found.offset = size
    found.source = packet + 12
    found.destination = packet + 16
    found.whole = not read_be16(packet + 6) & (IP_MF | IP_OFFMASK)
    while at < size and packet[at] != IPOPT_END:
        if packet[at] == IPOPT_NOOP:
            at += 1
            continue
        if at + 2 > size or packet[at + 1] < 2 or at + packet[at + 1] > size:
            raise malformed(f"the IPv4 option at byte {at} has no length that fits")
        # The third byte tells where the next hop stands, counted from 1; the last is the goal
        # (RFC 791 section 3.1).
        if (packet[at] in (IPOPT_LSRR, IPOPT_SSRR) and packet[at + 1] >= 7
                and packet[at + 2] + 3 <= packet[at + 1]):
            found.destination = packet + at + packet[at + 1] - 4
        at += packet[at + 1]
    return 0


cdef int walk_ipv6(const uint8_t *packet, Py_ssize_t length, Transport *found) except -1:
    cdef Py_ssize_t left, size
    if length < <Py_ssize_t> sizeof(ip6_hdr):
        raise malformed(f"an IPv6 header has {sizeof(ip6_hdr)} bytes, and only {length} are there")
    found.protocol = packet[6]
    found.offset = sizeof(ip6_hdr)
    found.source = packet + 8
    found.destination = packet + 24
    found.whole = True
    while found.whole and is_extension(found.protocol):
        left = length - found.offset
        size = extension_size(found.protocol, packet + found.offset) if left >= 2 else 2
        if size > left:
            raise malformed(f"its IPv6 extension header at byte {found.offset} claims {size} bytes,"
                            f" and only {left} are there")
        take_extension(packet + found.offset, size, found)
        found.protocol = packet[found.offset]
        found.offset += size
    return 0


cdef int take_extension(const uint8_t *header, Py_ssize_t size, Transport *found) except -1:
    """Note what an extension header means for the checksum of what follows it."""
    cdef const uint8_t *option
    if found.protocol == IPPROTO_HOPOPTS:
        if find_option(header, size, IP6OPT_JUMBO) is not NULL:
            raise malformed("it is a jumbogram (RFC 2675), whose length is not in the IP header")
    elif found.protocol == IPPROTO_DSTOPTS:
        option = find_option(header, size, HOME_ADDRESS)
        if option is not NULL and option[1] == 16:
            found.source = option + 2
    elif found.protocol == IPPROTO_FRAGMENT:
        found.whole = not read_be16(header + 2) & FRAGMENTED
    elif found.protocol == IPPROTO_ROUTING and header[3]:
        # Segments are left: the IP header has the next hop.
        if header[2] == SEGMENT_LIST and size >= 24:
            found.destination = header + 8
        elif header[2] in (SOURCE_ROUTE, HOME_ROUTE) and size >= 24:
            found.destination = header + size - 16
        else:
            found.whole = False
    return 0


cdef const uint8_t *find_option(const uint8_t *header, Py_ssize_t size,
                                uint8_t kind) except? NULL:
    """The option of this kind in a hop-by-hop or destination options header, NULL if it has none
    (RFC 8200 section 4.2)."""
    cdef Py_ssize_t at = 2
    while at < size:
        if header[at] == IP6OPT_PAD1:
            at += 1
            continue
        if at + 2 > size or at + 2 + header[at + 1] > size:
            raise malformed("an option in its IPv6 extension headers has no length that fits")
        if header[at] == kind:
            return header + at
        at += 2 + header[at + 1]
    return NULL


cdef int require_header(const uint8_t *packet, Py_ssize_t length,
                        const Transport *transport) except -1:
    """Raise if the header of what IP carries is not there as a whole."""
    cdef Py_ssize_t left = length - transport.offset
    cdef Py_ssize_t size = 0
    if not transport.whole:
        return 0
    if transport.protocol == IPPROTO_TCP:
        size = sizeof(tcphdr)
        if left >= size:
            size = 4 * (packet[transport.offset + 12] >> 4)
            if size < <Py_ssize_t> sizeof(tcphdr):
                raise malformed(f"its TCP header claims {size} bytes, and has at least "
                                f"{sizeof(tcphdr)}")
    elif transport.protocol == IPPROTO_UDP:
        size = sizeof(udphdr)
    elif transport.protocol == (IPPROTO_ICMP if packet[0] >> 4 == 4 else IPPROTO_ICMPV6):
        size = sizeof(icmphdr)
    if left < size:
        raise malformed(f"its {PROTOCOLS[transport.protocol]} header has {size} bytes, and only "
                        f"{left} are there")
    return 0


cdef malformed(str what):
    return ValueError(f"lengths and checksums of this packet cannot be made right: {what}; "
                      "with checksums=False it is taken as it is")


# The checksum of what IP carries.

cdef bint set_checksum(uint8_t *packet, Py_ssize_t length, const Transport *transport,
                       bint unfinished) noexcept nogil:
    """False where the protocol's is not known."""
    cdef bint ipv6 = packet[0] >> 4 == 6
    cdef uint8_t *addresses = packet + (8 if ipv6 else 12)
    cdef size_t size = 16 if ipv6 else 4
    cdef uint8_t kept[32]
    cdef bint known
    # The checksum covers the addresses in the IP header; those that count are there meanwhile.
    memcpy(kept, addresses, 2 * size)
    memmove(addresses, transport.source, size)
    memmove(addresses + size, transport.destination, size)
    known = set_checksum_by_header(packet, length, transport, unfinished)
    memcpy(addresses, kept, 2 * size)
    return known


cdef bint set_checksum_by_header(uint8_t *packet, Py_ssize_t length, const Transport *transport,
                                 bint unfinished) noexcept nogil:
    cdef bint ipv6 = packet[0] >> 4 == 6
    cdef uint8_t *header = packet + transport.offset
    cdef size_t left = length - transport.offset
    if transport.protocol == IPPROTO_TCP:
        if ipv6:
            nfq_tcp_compute_checksum_ipv6(<tcphdr *> header, <ip6_hdr *> packet)
        else:
            nfq_tcp_compute_checksum_ipv4(<tcphdr *> header, <iphdr *> packet)
    elif transport.protocol == IPPROTO_UDP:
        set_udp(packet, <udphdr *> header, left, unfinished)
    elif transport.protocol == IPPROTO_ICMP and not ipv6:
        set_icmp(<icmphdr *> header, left, 0)
    elif transport.protocol == IPPROTO_ICMPV6 and ipv6:
        # The pseudo-header (RFC 8200 section 8.1), which ICMP for IPv4 does without.
        set_icmp(<icmphdr *> header, left,
                 sum_of(packet + 8, 32) + htonl(<uint32_t> left) + htonl(IPPROTO_ICMPV6))
    else:
        return False
    return True


cdef void set_udp(uint8_t *packet, udphdr *header, size_t left, bint unfinished) noexcept nogil:
    cdef bint ipv6 = packet[0] >> 4 == 6
    header.len = htons(<uint16_t> left)
    # A sender over IPv4 may do without (RFC 768), one over IPv6 may not (RFC 8200 section 8.1).
    if not header.check and not ipv6 and not unfinished:
        return
    if ipv6:
        nfq_udp_compute_checksum_ipv6(header, <ip6_hdr *> packet)
    else:
        nfq_udp_compute_checksum_ipv4(header, <iphdr *> packet)
    if not header.check:
        header.check = 0xFFFF


cdef void set_icmp(icmphdr *header, size_t left, uint64_t pseudo_header) noexcept nogil:
    cdef uint64_t total
    # In ICMPv6, it is at the same place.
    header.checksum = 0
    total = pseudo_header + sum_of(<const uint8_t *> header, left)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    header.checksum = <uint16_t> ~total


cdef uint64_t sum_of(const uint8_t *data, size_t length) noexcept nogil:
    """The sum of words of 32 bits in the machine's order, filled up with zeros. Folded to 16 bits,
    it is that of RFC 1071 in the order of the network (section 2)."""
    cdef uint64_t total = 0
    cdef uint32_t word = 0
    cdef size_t at
    for at in range(0, length // 4 * 4, 4):
        memcpy(&word, data + at, 4)
        total += word
    word = 0
    memcpy(&word, data + length // 4 * 4, length % 4)
    return total + word

"""``NflogData``: a logged packet, and how it borrows its bytes from the read it came with."""
cimport cython
from cpython.object cimport PyTypeObject
from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from netfilterqueue._channel cimport DEBUG, Channel, Slab, alive_now
from netfilterqueue._netlink cimport length_of, nested_in, read_be16, read_be32, read_be64, value_of
from netfilterqueue._nflogformat cimport find, find_in, sized
from netfilterqueue._threads cimport add_to_total
from netfilterqueue._uapi cimport (
    IFNAMSIZ, NFULA_CT, NFULA_CT_INFO, NFULA_GID, NFULA_HWADDR, NFULA_HWHEADER, NFULA_HWTYPE,
    NFULA_IFINDEX_INDEV, NFULA_IFINDEX_OUTDEV, NFULA_IFINDEX_PHYSINDEV, NFULA_IFINDEX_PHYSOUTDEV,
    NFULA_MARK, NFULA_PACKET_HDR, NFULA_PAYLOAD, NFULA_PREFIX, NFULA_SEQ, NFULA_SEQ_GLOBAL,
    NFULA_TIMESTAMP, NFULA_UID, NFULA_VLAN, NFULA_VLAN_PROTO, NFULA_VLAN_TCI, if_indextoname,
    nfulnl_msg_packet_hdr, nfulnl_msg_packet_hw, nfulnl_msg_packet_timestamp, nlattr, nlmsghdr,
)

import os

from netfilterqueue import conntrack
from netfilterqueue.vlan import Vlan

# The attributes in the order of dict(data).
ATTRIBUTES = (
    "proto", "hwtype", "nfmark", "timestamp", "timestamp_us", "indev", "physindev", "outdev",
    "physoutdev", "uid", "gid", "hwaddr", "hwhdr", "payload", "prefix", "hook", "seq",
    "seq_global", "vlan", "conntrack",
)


# It takes part in no cycle: what it refers to, a slab and a channel, does not refer to it.
@cython.final
@cython.no_gc
@cython.freelist(256)
cdef class NflogData:
    """A logged packet: what the kernel says about it, read when asked.

    A handle makes these objects; they cannot be constructed. An attribute that the message lacks
    is None. ``dict(data)`` has them all. They stay readable for as long as the object lives.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("log messages come from an Nflog handle and cannot be constructed")

    def __dealloc__(self):
        if self.message is NULL:
            return
        if DEBUG:
            add_to_total(&alive_now.packets, -1)
        with cython.critical_section(self.channel):
            if self.slab is not None:
                self.place[0] = NULL
                self.slab.users -= 1
            else:
                free(<void *> self.message)

    def __iter__(self):
        return iter([(name, getattr(self, name)) for name in ATTRIBUTES])

    def __repr__(self):
        return f"<NflogData {dict(self)}>"

    @property
    def proto(self):
        """The protocol of the layer below: 0x0800 for IPv4, 0x86DD for IPv6 (NFULA_PACKET_HDR)."""
        cdef nfulnl_msg_packet_hdr header
        if not copy_of(self, NFULA_PACKET_HDR, &header, sizeof(header)):
            return None
        return read_be16(&header.hw_protocol)

    @property
    def hook(self):
        """The netfilter hook that logged it, a value of ``netfilterqueue.Hook``
        (NFULA_PACKET_HDR)."""
        cdef nfulnl_msg_packet_hdr header
        if not copy_of(self, NFULA_PACKET_HDR, &header, sizeof(header)):
            return None
        return header.hook

    @property
    def hwtype(self):
        """The kind of interface, a number of <linux/if_arp.h>: 1 for Ethernet (NFULA_HWTYPE)."""
        cdef uint16_t value
        return read_be16(&value) if copy_of(self, NFULA_HWTYPE, &value, sizeof(value)) else None

    @property
    def nfmark(self):
        """The packet's mark. The kernel says nothing of one that is 0 (NFULA_MARK)."""
        return u32_in(self, NFULA_MARK) or 0

    @property
    def timestamp(self):
        """When the packet arrived or was logged, in seconds since the epoch as time.time() counts
        them, with microseconds (NFULA_TIMESTAMP). None on OUTPUT and POSTROUTING."""
        microseconds = self.timestamp_us
        return None if microseconds is None else microseconds / 1000000

    @property
    def timestamp_us(self):
        """The same in microseconds, an int."""
        cdef nfulnl_msg_packet_timestamp stamp
        if not copy_of(self, NFULA_TIMESTAMP, &stamp, sizeof(stamp)):
            return None
        return <object> read_be64(&stamp.sec) * 1000000 + read_be64(&stamp.usec)

    @property
    def indev(self):
        """The name of the interface that it came from, looked up now; None where there is none,
        or none any more (NFULA_IFINDEX_INDEV). It is looked up in the network namespace of the
        handle, and once that is closed in that of the thread that asks."""
        return interface_in(self, NFULA_IFINDEX_INDEV)

    @property
    def physindev(self):
        """The name of the input port of a bridged packet, like indev (NFULA_IFINDEX_PHYSINDEV)."""
        return interface_in(self, NFULA_IFINDEX_PHYSINDEV)

    @property
    def outdev(self):
        """The name of the interface that it leaves by, like indev (NFULA_IFINDEX_OUTDEV)."""
        return interface_in(self, NFULA_IFINDEX_OUTDEV)

    @property
    def physoutdev(self):
        """The name of the output port of a bridged packet, like indev
        (NFULA_IFINDEX_PHYSOUTDEV)."""
        return interface_in(self, NFULA_IFINDEX_PHYSOUTDEV)

    @property
    def uid(self):
        """The user whose socket it belongs to; None where no socket of this host is known
        (NFULA_UID)."""
        return u32_in(self, NFULA_UID)

    @property
    def gid(self):
        """The group whose socket it belongs to, like uid (NFULA_GID)."""
        return u32_in(self, NFULA_GID)

    @property
    def hwaddr(self):
        """The source's hardware address as bytes, six on Ethernet (NFULA_HWADDR)."""
        cdef nfulnl_msg_packet_hw hw
        cdef uint16_t length
        if not copy_of(self, NFULA_HWADDR, &hw, sizeof(hw)):
            return None
        length = read_be16(&hw.hw_addrlen)
        if length > sizeof(hw.hw_addr):
            return None
        return (<const char *> hw.hw_addr)[:length]

    @property
    def hwhdr(self):
        """The link layer's header as bytes, 14 on Ethernet (NFULA_HWHEADER)."""
        return bytes_in(self, NFULA_HWHEADER)

    @property
    def payload(self):
        """The packet from its network header on, as bytes, as much of it as the group and the rule
        have copied (NFULA_PAYLOAD)."""
        return bytes_in(self, NFULA_PAYLOAD)

    @property
    def prefix(self):
        """The text that the rule gives its messages (NFULA_PREFIX). Bytes that are not UTF-8 are
        escaped as in os.fsdecode()."""
        prefix = bytes_in(self, NFULA_PREFIX)
        if prefix is None:
            return None
        return prefix.partition(b"\0")[0].decode("utf-8", "surrogateescape")

    @property
    def seq(self):
        """The message's number in the group, counting from 0; after 2**32 - 1 comes 0
        (FLAG_SEQ, NFULA_SEQ)."""
        return u32_in(self, NFULA_SEQ)

    @property
    def seq_global(self):
        """The message's number among those of all groups (FLAG_SEQ_GLOBAL, NFULA_SEQ_GLOBAL)."""
        return u32_in(self, NFULA_SEQ_GLOBAL)

    @property
    def vlan(self):
        """The VLAN tag of a bridged packet, a ``netfilterqueue.vlan.Vlan``; None where there is
        none (NFULA_VLAN)."""
        cdef const nlattr *nested
        with cython.critical_section(self.channel):
            nested = find(self.message, self.length, NFULA_VLAN)
            if nested is NULL:
                return None
            proto = u16_of(find_in(nested_in(nested), NFULA_VLAN_PROTO))
            tci = u16_of(find_in(nested_in(nested), NFULA_VLAN_TCI))
        return None if proto is None or tci is None else Vlan(proto, tci)

    @property
    def conntrack(self):
        """The connection that it belongs to, a ``netfilterqueue.conntrack.Conntrack``, decoded each
        time. None where it is not tracked or without FLAG_CONNTRACK (NFULA_CT)."""
        content = bytes_in(self, NFULA_CT)
        return None if content is None else conntrack.decode(content, bytes_in(self, NFULA_CT_INFO))


cdef bint copy_of(NflogData data, uint16_t kind, void *copy, size_t size) noexcept:
    """Whether there is such an attribute, of this size: then it is copied."""
    cdef const char *value
    with cython.critical_section(data.channel):
        value = sized(find(data.message, data.length, kind), size)
        if value is not NULL:
            memcpy(copy, value, size)
    return value is not NULL


cdef object u16_of(const nlattr *attribute):
    cdef const char *value = sized(attribute, sizeof(uint16_t))
    return None if value is NULL else read_be16(value)


cdef object u32_in(NflogData data, uint16_t kind):
    cdef uint32_t value
    return read_be32(&value) if copy_of(data, kind, &value, sizeof(value)) else None


cdef object bytes_in(NflogData data, uint16_t kind):
    cdef const nlattr *attribute
    with cython.critical_section(data.channel):
        attribute = find(data.message, data.length, kind)
        return None if attribute is NULL else value_of(attribute)[:length_of(attribute)]


cdef object interface_in(NflogData data, uint16_t kind):
    cdef char name[IFNAMSIZ]
    cdef uint32_t value
    if not copy_of(data, kind, &value, sizeof(value)):
        return None
    with cython.critical_section(data.channel):
        if data.channel.fd >= 0:
            return data.channel.interface_name(read_be32(&value))
    # The socket is no longer there to ask. Programs look at messages after their last read, and
    # hardly any of them has a thread elsewhere.
    return None if if_indextoname(read_be32(&value), name) is NULL else os.fsdecode(name)


cdef NflogData lend(Channel channel, Slab slab, const nlmsghdr *message, size_t length):
    """The object for a message of a slab, which borrows it until keep() or its end."""
    cdef NflogData data = NflogData.__new__(NflogData)
    data.place = slab.lend_to(<void *> data)
    if DEBUG:
        add_to_total(&alive_now.packets, 1)
    data.channel = channel
    data.message = message
    data.length = length
    data.slab = slab
    slab.users += 1
    return data


cdef int keep(object message) except -1:
    """Have it be a copy of its own: its slab is about to be used again."""
    cdef NflogData data = message
    cdef void *copy = malloc(data.length)
    if copy is NULL:
        raise MemoryError()
    data.message = <const nlmsghdr *> memcpy(copy, data.message, data.length)
    data.place[0] = NULL
    data.slab.users -= 1
    data.slab = None
    return 0


# Users know the class by the public module's name.
(<PyTypeObject *> NflogData).tp_name = b"netfilterqueue.nflog.NflogData"

"""What a verdict changes besides the mark and the payload: checked, and kept until it is given."""
cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport uint16_t
from libc.string cimport memcpy, memset

from netfilterqueue._nfqueue cimport (
    CHANGE_CONNTRACK_LABELS, CHANGE_CONNTRACK_MARK, CHANGE_L2_HEADER, CHANGE_PRIORITY,
    CHANGE_VLAN,
)

from netfilterqueue._arguments import MAX_UINT32, bytes_of, integer


@cython.final
@cython.no_gc
cdef class PacketChanges:

    cdef int set_priority(self, priority) except -1:
        self.values.priority = integer("priority", priority, 0, MAX_UINT32)
        self.values.which |= CHANGE_PRIORITY
        return 0

    cdef int set_conntrack_mark(self, mark) except -1:
        self.values.conntrack_mark = integer("the connection's mark", mark, 0, MAX_UINT32)
        self.values.which |= CHANGE_CONNTRACK_MARK
        return 0

    cdef int set_conntrack_labels(self, labels) except -1:
        cdef bytes content = bytes_of("labels", labels)
        cdef Py_ssize_t size = sizeof(self.values.conntrack_labels)
        if not 1 <= len(content) <= size:
            raise ValueError(f"there are {len(content)} bytes of labels, but must be from 1 to "
                             f"{size}: one bit a label")
        memset(self.values.conntrack_labels, 0, size)
        memcpy(self.values.conntrack_labels, PyBytes_AS_STRING(content),
               PyBytes_GET_SIZE(content))
        self.values.which |= CHANGE_CONNTRACK_LABELS
        return 0

    cdef int set_vlan(self, proto, tci) except -1:
        cdef uint16_t checked_proto = integer("proto", proto, 0, 0xFFFF)
        self.values.vlan_tci = integer("tci", tci, 0, 0xFFFF)
        self.values.vlan_proto = checked_proto
        self.values.which |= CHANGE_VLAN
        return 0

    cdef int set_l2_header(self, l2_header, Py_ssize_t length) except -1:
        """``length``: bytes that the packet's own has, in whose place it is written."""
        cdef bytes content = bytes_of("l2_header", l2_header)
        if len(content) != length:
            raise ValueError(f"a link layer's header of {len(content)} bytes cannot be set: it "
                             f"takes the place of the packet's own, which has {length}")
        self.values.l2_header = PyBytes_AS_STRING(content)
        self.values.l2_header_length = PyBytes_GET_SIZE(content)
        self.values.which |= CHANGE_L2_HEADER
        self.l2_header = content
        return 0

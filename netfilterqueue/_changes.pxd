"""What a verdict changes besides the mark and the payload."""
from netfilterqueue._nfqueue cimport Changes


cdef class PacketChanges:
    """Those of one packet. Few packets have one, made with the first change."""
    cdef Changes values
    cdef bytes l2_header        # whose bytes values.l2_header names, or None

    cdef int set_priority(self, priority) except -1
    cdef int set_conntrack_mark(self, mark) except -1
    cdef int set_conntrack_labels(self, labels) except -1
    cdef int set_vlan(self, proto, tci) except -1
    cdef int set_l2_header(self, l2_header, Py_ssize_t length) except -1

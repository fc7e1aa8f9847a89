"""IP packets: what they carry, and their lengths and checksums."""
from netfilterqueue._nfqueue cimport PacketFields

cdef int protocol_of(bytes packet) noexcept
cdef int require_fit(bytes packet, const PacketFields *fields, bint truncate) except -1
cdef bytes with_checksums(bytes packet, bytes unfinished, bint *whole)

"""IP packets: what they carry, and their lengths and checksums."""

cdef int protocol_of(bytes packet) noexcept
cdef cut_short(Py_ssize_t length, Py_ssize_t original)
cdef bytes with_checksums(bytes packet, bytes unfinished, bint *whole)
cdef int require_same_segments(bytes packet, Py_ssize_t length) except -1

"""IP packets: what they carry, and their lengths and checksums."""
from libc.stdint cimport uint8_t


cdef int upper_protocol(const uint8_t *packet, Py_ssize_t length) noexcept nogil
cdef bytes with_checksums(bytes packet, bint unfinished, bint *whole)
cdef int require_same_segments(bytes packet, Py_ssize_t length) except -1

"""IP packets: what they carry, and their lengths and checksums."""
from libc.stdint cimport uint8_t


cdef int upper_protocol(const uint8_t *packet, Py_ssize_t length) noexcept nogil
cdef bint make_right(uint8_t *packet, Py_ssize_t length, bint unfinished) except -1

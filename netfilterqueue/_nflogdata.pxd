"""A logged packet."""
from netfilterqueue._channel cimport Channel, Slab
from netfilterqueue._uapi cimport nlmsghdr


cdef class NflogData:
    cdef Channel channel            # that it came by: its critical section guards what is below
    cdef const nlmsghdr *message    # NULL: made by nobody who may
    cdef size_t length              # of the message, bytes
    cdef Slab slab                  # that it is in; None once it is a copy of our own
    cdef void **place               # in slab.lent; each of them counts among slab.users


cdef NflogData lend(Channel channel, Slab slab, const nlmsghdr *message, size_t length)
cdef int keep(object message) except -1

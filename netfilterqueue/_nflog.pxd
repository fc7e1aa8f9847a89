"""A group of log messages."""
from libc.stdint cimport uint32_t, uint64_t
from posix.types cimport pid_t

from netfilterqueue._channel cimport Channel, Slab
from netfilterqueue._netlink cimport Cursor
from netfilterqueue._nflogdata cimport NflogData
from netfilterqueue._uapi cimport nlmsghdr


cdef class Nflog:
    cdef object __weakref__
    cdef Channel channel            # its critical section guards what is below: messages know the
    #                               channel, not their handle, which would be a cycle. Who calls the
    #                               methods is in it
    cdef int group
    cdef pid_t opened_by            # a forked child must not unbind its parent's group
    cdef bint closed                # or not opened yet
    cdef bint raises_overruns       # ENOBUFS_RAISE
    cdef uint64_t overruns          # of the channel's, those that are in `drops`
    cdef readonly uint64_t queued   # messages read and not handed out
    cdef uint64_t drop_count        # overruns since somebody set `drops` to zero
    cdef list waiting               # slabs read and not begun
    cdef Slab slab                  # being handed out, or None
    cdef int remaining              # messages of it not looked at
    cdef int slot                   # next datagram of it
    cdef Cursor rest                # of the datagram at hand
    cdef bint begins                # none of its messages was looked at
    cdef NflogData older            # the two messages of it handed out last
    cdef NflogData newer
    cdef list lent                  # the two latest slabs that messages were handed out from
    cdef bint sequenced             # messages are numbered: FLAG_SEQ
    cdef uint32_t next_seq          # of the next message, if none is missed
    cdef uint64_t missed            # messages, by the gaps between their numbers
    cdef int runners                # calls and loops that hand out messages, under way
    cdef bint stopping

    cdef int configure(self, options) except -1
    cdef int release_group(self) except -1
    cdef int take_arrived(self) except -1
    cdef int enter(self) except -1
    cdef int leave(self) except -1
    cdef int show_readable(self) except -1
    cdef int read(self, bint wait) except -1
    cdef NflogData await_message(self, bint wait)
    cdef bint fill(self, bint wait) except -1
    cdef int take(self, Slab slab) except -1
    cdef NflogData next_read(self)
    cdef NflogData hand_out(self, const nlmsghdr *message, size_t length)
    cdef bint begin_slab(self) except -1
    cdef int begin_datagram(self, int slot) except -1
    cdef int end_slab(self) except -1
    cdef int note_seq(self, const nlmsghdr *message, size_t length) noexcept
    cdef int note_overruns(self) except -1
    cdef int forget_messages(self) except -1
    cdef int begin_in_child(self) except -1

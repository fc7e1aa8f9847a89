"""What a queue has read and not handed out yet."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from netfilterqueue._channel cimport Channel, Slab
from netfilterqueue._outbox cimport VERDICTS, Outbox
from netfilterqueue._packet cimport Batch, Packet, Tally
from netfilterqueue._signals cimport Watch


cdef struct Limits:
    bint waits                  # for packets: if not, it hands out what is pending
    bint timed                  # it waits until the deadline, on the clock of time.monotonic()
    double deadline
    Py_ssize_t wanted           # packets to hand out, at the most
    int64_t pending             # packets that were, when it was called, and are not read; at most
    bint emptied                # nothing is left of them, and it does not wait for others
    uint64_t stops              # of the queue's calls of stop(), those that are not for it
    unsigned long thread        # that began it
    Watch watch                 # over signals, once it waits

cdef Limits limits_of(block, timeout, count) except *


cdef class Receiver:
    """Its critical section guards it and its channel, batches, slabs and packets. Who calls the
    methods is in it; those that wait for packets, begin or end a call enter it themselves."""
    cdef Channel channel        # None until it is needed: a subclass may never call __init__
    cdef Outbox outbox          # of the present binding; None: not bound
    cdef Outbox ending          # of one whose counts are not yet among those of earlier bindings
    cdef Packet spare           # one that the callback is done with, to serve again, or None
    cdef Batch first            # batches with packets that wait to be handed out, a linked list
    cdef Batch last             # the end of that list, or the last one that was
    cdef list pulled            # the two latest slabs that packets were pulled from: its users too
    cdef Slab borrowed          # of run_socket(): for bytes that another's recv() returned
    cdef list runners           # threads of the calls that hand out packets, under way
    cdef list awaiting          # descriptors that coroutines wait for, duplicates of the channel's
    cdef uint64_t stops         # calls of stop()
    cdef uint64_t heard         # of them, those that a call has ended by
    cdef uint32_t max_len       # the most packets that could wait since bind()
    cdef bint is_closed
    cdef Tally tally
    cdef uint64_t given[VERDICTS]   # verdicts of each kind, of earlier bindings
    cdef uint64_t abandoned     # packets collected undecided, of earlier bindings
    cdef dict verdict_errors    # errno: how many verdicts the kernel refused with it
    cdef uint64_t request_errors    # refusals of requests that nobody waits for

    cdef int require_open(self) except -1
    cdef int require_bound(self) except -1
    cdef Outbox enter(self, Limits *limits)
    cdef int leave(self, Outbox outbox, Limits *limits, list packets) except -1
    cdef int leave_with(self, list packets, Outbox outbox, Limits *limits) except -1
    cdef Packet await_packet(self, Outbox outbox, Limits *limits, bint to_keep)
    cdef int take_back(self, Packet packet) except -1
    cdef Packet await_through(self, sock, Outbox outbox, Limits *limits)
    cdef Slab borrow(self, bytes datagram)
    cdef bytes receive_from(self, sock)
    cdef bint have_several(self) noexcept
    cdef Packet pull(self)
    cdef int take_arrived(self) except -1
    cdef int end_binding(self) except -1
    cdef uint64_t verdicts_given(self, int kind) noexcept
    cdef uint64_t packets_abandoned(self) noexcept
    cdef int note_refusals(self, Outbox outbox) except -1
    cdef int forget_batches(self) except -1


cdef Packet next_packet(Receiver queue)
cdef int take(Receiver queue, Slab slab, Outbox outbox) except -1


cdef class Pulling:
    """Packets pulled from one binding, without waiting: what aio builds on."""
    cdef Receiver queue
    cdef Outbox outbox          # of the binding at hand when it began
    cdef Limits limits
    cdef bint closed            # or not begun

    cdef bint has_ended(self) noexcept

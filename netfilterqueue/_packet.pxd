"""Packets, and the reads that they came with."""
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from netfilterqueue._changes cimport PacketChanges
from netfilterqueue._channel cimport Slab
from netfilterqueue._netlink cimport Cursor
from netfilterqueue._nfqueue cimport Decision, PacketFields, Skipped
from netfilterqueue._outbox cimport Outbox, failed
from netfilterqueue._threads cimport is_only_reference
from netfilterqueue._uapi cimport nlmsghdr


cdef struct Tally:
    uint64_t batches            # reads that brought packets
    uint64_t packets            # handed out
    uint64_t bytes              # of payload in them
    uint64_t truncated          # of them, those of which only the beginning was copied
    Skipped skipped


cdef class Packet


cdef class Batch:
    """The packets of one read, handed out one by one."""
    cdef Slab slab              # None once all packets are handed out
    cdef Outbox outbox          # of the binding that they came for
    cdef uint32_t forks         # of the outbox, when they were read
    cdef int undecided          # packets without a verdict, those not handed out included
    cdef int remaining          # messages not looked at
    cdef int packets            # of it, alive
    cdef int slot               # next datagram
    cdef Cursor rest            # of the datagram at hand
    cdef Batch following        # the next one of the same queue

    cdef Packet next(self, Packet used, object owner, Tally *tally)
    cdef bint unwrap(self, Packet packet, const nlmsghdr *message, size_t length,
                     Tally *tally) noexcept
    cdef int end(self) except -1


cdef Batch new_batch(Slab slab, Outbox outbox, Batch used)


cdef class Packet:
    cdef Batch batch            # None: made by nobody who may
    cdef object owner           # the queue: it must live while a packet of its does; or, for one
    #                             made by hand, a dict with the names of its interfaces. Its
    #                             critical section guards what is below, and the batch
    cdef Slab slab              # whose bytes fields.payload borrows; None once they may be reused
    cdef void **place           # in slab.lent; NULL: not there
    cdef PacketFields fields
    cdef bytes retained         # payload kept by retain()
    cdef bytes rare             # what fields.rare names once the slab is given back, or None
    cdef bytes replacement      # payload given by set_payload()
    cdef PacketChanges changes  # other than these two, or None
    cdef uint32_t new_mark
    cdef bint has_new_mark
    cdef bint retained_own      # it is the packet's own, not one that replaced it
    cdef bint decided           # unless that flight failed, see is_decided()
    cdef uint32_t given         # the verdict, once decided
    cdef uint64_t flight        # number of the send that carries it

    cdef int keep_payload(self) except -1
    cdef int end_borrowing(self) except -1
    cdef bint renew(self) except -1
    cdef int keep_rare(self) except -1
    cdef bytes any_payload(self)
    cdef bytes payload(self)
    cdef bytes unfinished(self)
    cdef bytes rare_value(self, uint16_t kind)
    cdef object interface_name(self, uint32_t index)
    cdef PacketChanges any_changes(self)
    cdef int require_bridged(self) except -1
    cdef int require_connection(self) except -1
    cdef int decide(self, uint32_t verdict) except -1
    cdef int abandon(self) except -1
    cdef int send_decision(self, const Decision *decision) except -1


cdef inline bint is_decided(Packet packet) noexcept:
    return packet.decided and not failed(packet.batch.outbox, packet.flight)


cdef inline bint is_free(Packet packet) noexcept:
    """Whether nobody else has it, and nothing hangs on it that another message would inherit."""
    return (is_only_reference(<void *> packet)
            and packet.retained is None and packet.rare is None
            and packet.replacement is None and packet.changes is None)

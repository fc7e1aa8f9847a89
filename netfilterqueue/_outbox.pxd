"""Verdicts that wait to be sent."""
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from netfilterqueue._nfqueue cimport Decision
from netfilterqueue._uapi cimport pthread_cond_t, pthread_mutex_t, pthread_t


cdef enum:
    # Sequence numbers of verdicts have this bit; those of requests do not.
    VERDICT_SEQUENCE = 0x80000000
    # The others are the last ones of the number of the send, a flight's, which has 64: a busy queue
    # has sent 2 ** 31 times within hours.
    FLIGHT_BITS = 0x7FFFFFFF
    # The kinds of verdicts fit into 3 bits; above them is the number of another queue, and a flag.
    VERDICTS = 8
    # What becomes of a packet that is collected undecided, where no verdict is given to it:
    NO_DEFAULT = -1         # nothing, and a warning
    OTHERS_DECIDE = -2      # nothing: this binding's packets are the program's own affair


cdef inline bint is_verdict(uint32_t sequence) noexcept nogil:
    return sequence & <uint32_t> VERDICT_SEQUENCE != 0


cdef struct Waiting:
    # What the helper thread shares with the Outbox. It is no Python object: the helper never
    # holds the GIL, and this must stay until the helper has ended.
    # A verdict that is sent alone touches the first lines of the cache only.
    pthread_mutex_t wire        # held while sending, so that verdicts leave in order; taken first.
    #                             Enough for `fill` and `flight` while nothing is pending
    int fd                      # -1: there is no kernel, sending does nothing
    int late_error              # errno of a send that nobody was told of, for the next caller
    char *fill                  # messages, one after the other
    size_t length               # bytes in it
    size_t capacity
    uint64_t flight             # number of the send that `fill` will be
    size_t failures             # pairs in `failed`
    uint32_t forks              # of the process, of which this one was the child
    uint64_t given[VERDICTS]    # verdicts of each kind, taken in
    pthread_mutex_t lock        # guards all but `wire`; never held in a system call but the wake-up
    pthread_cond_t wakeup       # for the helper alone
    char *spare                 # being sent, or idle
    size_t spare_capacity
    uint64_t *failed            # pairs: the first and the last number of flights that failed
    uint64_t abandoned          # packets that were collected undecided
    pthread_t helper
    bint running                # there is a helper
    bint parked                 # it sleeps without a timer
    bint ending                 # it is to end
    int64_t period              # nanoseconds between two ticks
    uint64_t tick
    uint64_t stamp              # tick at which the first message in `fill` came
    Waiting *previous           # in the list for fork()
    Waiting *next


cdef class Outbox:
    """Verdict messages of one binding, collected and sent by one system call.

    They are sent at once if no other packet of the same read is undecided; else when the last of
    them is decided, when the loop goes back to read, or by the helper thread ``delay`` seconds
    after the first was given, whichever comes first. Verdicts leave in the order given.
    """
    cdef Waiting *waiting
    cdef object descriptor_owner    # closes it, and must not before the helper has ended
    cdef bint closed                # the queue was unbound: no verdict can be given any more
    cdef int default_verdict        # for packets that are collected undecided, or see above

    cdef int start_helper(self) except -1
    cdef bint make_room(self, const Decision *decision) except -1
    cdef bint add(self, uint16_t queue_num, uint32_t id, const Decision *decision,
                  int *undecided, uint64_t *flight) except -1
    cdef int flush(self) except -1
    cdef int finish(self) except -1
    cdef int raise_late_error(self) except -1
    cdef int postpone(self, int error) noexcept
    cdef bint cares_for(self, uint32_t forks) noexcept
    cdef bint is_among_failed(self, uint64_t flight) noexcept
    cdef int refused(self, uint32_t sequence, int error) noexcept
    cdef int close(self) except -1


cdef inline bint unsettled(Outbox outbox) noexcept:
    """Whether flush() or raise_late_error() have anything to do: for those who ask often."""
    return outbox.waiting.length or outbox.waiting.late_error


cdef inline bint failed(Outbox outbox, uint64_t flight) noexcept:
    """Whether that send failed."""
    return outbox.waiting.failures and outbox.is_among_failed(flight)

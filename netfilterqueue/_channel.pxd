"""One netlink socket, and the memory that it reads into."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

from netfilterqueue._netlink cimport Cursor
from netfilterqueue._signals cimport Watch
from netfilterqueue._threads cimport read_count
from netfilterqueue._uapi cimport iovec, mmsghdr, nlmsghdr, pthread_cond_t, pthread_mutex_t


cdef extern from *:
    """
    #ifndef NETFILTERQUEUE_BUFFER_SIZE
    #define NETFILTERQUEUE_BUFFER_SIZE 69632
    #endif
    #ifndef NETFILTERQUEUE_DEBUG
    #define NETFILTERQUEUE_DEBUG 0
    #endif
    """
    enum:
        # Bytes of a queue's slot; the default holds the largest packet with its attributes.
        BUFFER_SIZE "NETFILTERQUEUE_BUFFER_SIZE"
        # In a debug build the objects alive are counted, see alive().
        DEBUG "NETFILTERQUEUE_DEBUG"


cdef struct Alive:
    int64_t slabs
    int64_t packets
    int64_t descriptors
    int64_t helpers

cdef Alive alive_now


cdef enum:
    # What request() returns where somebody else's read has taken the kernel's answer; no errno.
    UNANSWERED = 0x10000


cdef int check(int result, str call) except -1
cdef object os_error(int error, str what)
cdef int duplicate(int sockfd) except -1


cdef class Channel


cdef class Slab:
    """The memory of one read: as many slots as datagrams can come at once."""
    cdef mmsghdr *headers       # one a slot, as recvmmsg(2) takes and fills them
    cdef iovec *vectors         # one a slot: where it is
    cdef bytes source           # where the bytes are another object's: that object
    cdef unsigned int slots
    cdef int filled             # slots that hold a datagram
    cdef int messages           # in them, netlink's own (errors, acknowledgements) left out
    cdef int users              # a reader, a batch, packets: reused only at 0
    cdef int views              # memoryviews: reused only at 0. They end on any thread, without a
    #                             lock: to be changed by add_to()
    cdef void **lent            # objects that borrow until they are asked to take copies: no
    #                             references; NULL at the place of one that borrows no longer
    cdef int places             # of `lent`, given to such objects so far

    cdef int lend(self, bytes source) except -1
    cdef int put(self, bytes content) except -1
    cdef int take_stock(self, Channel channel) except -1
    cdef void **lend_to(self, void *borrower) except NULL
    cdef int settle(self, int (*keep)(object) except -1) except -1


cdef Slab slab_of(list datagrams)


# For every packet.

cdef inline bint is_idle(Slab slab) noexcept:
    """Whether nobody looks at its bytes, so that others may take their place."""
    return not slab.users and not read_count(&slab.views)


cdef inline Cursor datagram_in(Slab slab, int slot) noexcept:
    cdef Cursor cursor
    cursor.at = <const char *> slab.vectors[slot].iov_base
    cursor.left = slab.headers[slot].msg_len
    return cursor


cdef class Channel:
    """A netlink socket of the netfilter family, connected to the kernel."""
    # Of every read, in as few lines of the cache as they fit into:
    cdef readonly int fd        # -1 once closed
    cdef int readers            # reads under way, those interrupted by a signal handler included
    cdef int reading            # of them, those in the system call itself, or in another's recv()
    cdef int waiters            # threads that wait for a read to end
    cdef unsigned int slots     # of the slabs to be made
    cdef bint nudged            # an acknowledgement that nobody awaits is in the socket
    cdef Slab latest            # of the pool, the one read into last: its memory is in the cache
    cdef list refusals          # (sequence number, errno) of messages that asked for no answer
    # Of some:
    cdef list slabs             # a small pool; those with users are passed over
    cdef size_t slot_size       # bytes
    cdef list arrived           # slabs with messages that came while an answer was awaited
    cdef list foreign           # of those reading, the threads in another object's recv()
    cdef uint32_t sequence      # of the last request that awaits its answer
    cdef dict answers           # sequence number -> errno of the kernel's answer, or None as yet
    cdef uint64_t overruns      # how often the kernel said that messages did not fit: ENOBUFS
    cdef uint64_t lost          # what lost_to_overruns() said last
    cdef uint64_t malformed     # datagrams, or ends of them, that are no netlink messages
    cdef pthread_mutex_t lock   # guards the two below; nobody takes the GIL with it
    cdef pthread_cond_t news    # for them alone
    cdef unsigned int ends      # of reads that somebody waited for

    cdef uint32_t port_id(self) except? 0
    cdef int shape(self, unsigned int slots, size_t slot_size) except -1
    cdef int forget_slabs(self) except -1
    cdef Slab receive(self, Watch *watch)
    cdef bint never_waits(self) except -1
    cdef int await_readable(self, int milliseconds) except -1
    cdef int take(self, const nlmsghdr *message, size_t length) except -1
    cdef Slab receive_until(self, double deadline, Watch *watch)
    cdef void make_locks(self) noexcept
    cdef int begin_foreign(self) except -1
    cdef int end_foreign(self) except -1
    cdef int others_reading(self) except -1
    cdef int await_readers(self) except -1
    cdef int await_news(self, double deadline) except -1
    cdef int request(self, nlmsghdr *message) except -1
    cdef int await_answer(self, uint32_t sequence) except -1
    cdef int keep(self, Slab slab) except -1
    cdef int transmit(self, const nlmsghdr *message) except -1
    cdef int wake(self) except -1
    cdef int nudge(self) except -1
    cdef int discard_pending(self) except -1
    cdef int discard_arrived(self) except -1
    cdef int forget_threads(self) except -1
    cdef int size_receive_buffer(self, int size) except -1
    cdef int receive_buffer(self) except -1
    cdef int report_overruns(self) except -1
    cdef uint64_t lost_to_overruns(self) noexcept
    cdef int stamp_packets(self, bint on) except -1
    cdef object interface_name(self, uint32_t index)
    cdef int close(self) except -1

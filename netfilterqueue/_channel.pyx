"""One netlink socket: opened, configured, read in batches, woken. What its messages mean is for
others to know."""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, ENOBUFS, ENODEV, errno
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from netfilterqueue._netlink cimport Cursor, next_message, send_noop
from netfilterqueue._signals cimport Watch, begin_watch, forget_socket, watching
from netfilterqueue._threads cimport (
    add_to, add_to_total, allow_to_take, from_now, give_back, init_condition, try_to_take,
    wait_until,
)
from netfilterqueue._uapi cimport close as close_descriptor
from netfilterqueue._uapi cimport (
    AF_NETLINK, F_DUPFD_CLOEXEC, F_GETFL, MSG_DONTWAIT, MSG_NOSIGNAL, NETLINK_CAP_ACK,
    NETLINK_NETFILTER, NETLINK_NO_ENOBUFS, NLMSG_ERROR, NLMSG_MIN_TYPE, O_NONBLOCK, POLLIN,
    SIOCGIFNAME, SK_MEMINFO_DROPS, SOCK_CLOEXEC, SOCK_RAW, SOL_NETLINK, SOL_SOCKET, SO_DOMAIN,
    SO_MEMINFO, SO_PROTOCOL, SO_RCVBUF, SO_RCVBUFFORCE, SO_TIMESTAMP, bind, clock_time, connect,
    fcntl, getsockname, getsockopt, ifreq, ioctl, mmsghdr, nlmsgerr, nlmsghdr, poll, pollfd,
    pthread_cond_broadcast, pthread_cond_destroy, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock, recv, recvmmsg, send, setsockopt, sockaddr,
    sockaddr_nl, socket, socklen_t,
)

import os
import threading
import time

cdef enum:
    POOLED_SLABS = 4
    PAGE = 4096
    CACHE_LINE = 64
    MAX_MILLISECONDS = 0x7FFFFFFF

# How often a request is sent whose answer is lost.
cdef enum:
    TRIES = 3

# Seconds for which a thread waits for what another thread has read, or for it to end its read.
# Only a reader that is not this module's, or runs on this very thread, takes longer.
PATIENCE = 1.0


def alive():
    """Objects alive in a debug build, by kind; None in any other build."""
    return dict(alive_now) if DEBUG else None


cdef object os_error(int error, str what):
    return OSError(error, f"{what}: {os.strerror(error)}")


cdef int check(int result, str call) except -1:
    """The gate for system calls: their result, or an OSError with errno."""
    cdef int error = errno
    if result < 0:
        raise os_error(error, call)
    return result


cdef class Slab:

    def __cinit__(self, unsigned int slots, size_t slot_size):
        cdef unsigned int slot
        cdef size_t stride = (slot_size + PAGE - 1) & ~(<size_t> PAGE - 1)
        # Slots that all began at the same place of a page would share the same few cache sets:
        # five lines, about what a small packet's message fills, set each off from the last.
        stride += 5 * CACHE_LINE
        # One block, so that a read of one small packet touches one page.
        cdef size_t tables = slots * (sizeof(mmsghdr) + sizeof(iovec))
        cdef char *memory = <char *> malloc(tables + slots * stride)
        if memory is NULL:
            raise MemoryError(f"no memory for {slots} slots of {slot_size} bytes: "
                              "bind with a smaller batch")
        memset(memory, 0, tables)
        self.slots = slots
        self.headers = <mmsghdr *> memory
        self.vectors = <iovec *> (memory + slots * sizeof(mmsghdr))
        for slot in range(slots):
            self.vectors[slot].iov_base = memory + tables + slot * stride
            self.vectors[slot].iov_len = slot_size
            self.headers[slot].msg_hdr.msg_iov = &self.vectors[slot]
            self.headers[slot].msg_hdr.msg_iovlen = 1
        if DEBUG:
            add_to_total(&alive_now.slabs, 1)

    def __dealloc__(self):
        if DEBUG and self.headers is not NULL:
            add_to_total(&alive_now.slabs, -1)
        free(self.lent)
        free(self.headers)

    # A packet's memoryview names its slab as the exporter: so the slab lives as long as the view,
    # whatever becomes of the packet, and hears of the view's end.

    def __getbuffer__(self, Py_buffer *view, int flags):
        raise BufferError("a slab's bytes are seen through its packets only")

    def __releasebuffer__(self, Py_buffer *view):
        add_to(&self.views, -1)

    cdef int lend(self, bytes source) except -1:
        """Hold one datagram that somebody else received."""
        self.source = source
        self.vectors[0].iov_base = PyBytes_AS_STRING(source)
        self.headers[0].msg_len = <unsigned int> PyBytes_GET_SIZE(source)
        self.filled = 1
        return 0

    cdef int put(self, bytes content) except -1:
        """Copy a datagram into the next slot."""
        memcpy(self.vectors[self.filled].iov_base, PyBytes_AS_STRING(content), len(content))
        self.headers[self.filled].msg_len = <unsigned int> len(content)
        self.filled += 1
        return 0

    cdef int take_stock(self, Channel channel) except -1:
        """Count the messages, and give netlink's own to the channel, where there is one."""
        cdef Cursor cursor
        cdef const nlmsghdr *message
        cdef size_t length
        cdef int slot
        self.messages = 0
        # Whoever borrowed its bytes has given them back, or it would not have been filled again.
        if self.lent is not NULL:
            free(self.lent)
            self.lent = NULL
            self.places = 0
        if channel is not None:
            channel.nudged = False
        for slot in range(self.filled):
            cursor = datagram_in(self, slot)
            while True:
                message = next_message(&cursor, &length)
                if message is NULL:
                    break
                if message.nlmsg_type >= NLMSG_MIN_TYPE:
                    self.messages += 1
                elif channel is not None:
                    channel.take(message, length)
            if cursor.left and channel is not None:
                channel.malformed += 1
        return 0

    # What borrows its bytes beyond a callback is noted here, so that it can be asked to take a copy
    # before they are overwritten.

    cdef void **lend_to(self, void *borrower) except NULL:
        """Note the borrower of a message; to its place in ``lent`` it writes NULL at the end."""
        if self.lent is NULL:
            self.lent = <void **> malloc(self.messages * sizeof(void *))
            if self.lent is NULL:
                raise MemoryError()
        allow_to_take(borrower)
        self.lent[self.places] = borrower
        self.places += 1
        return &self.lent[self.places - 1]

    cdef int settle(self, int (*keep)(object) except -1) except -1:
        """Have the borrowers take copies, which is what ``keep`` does for one."""
        cdef void *borrower
        cdef int place
        for place in range(self.places):
            # A copy can start the garbage collector, which can take borrowers out of the list. One
            # that another thread is about to end waits for us, and needs no copy.
            borrower = self.lent[place]
            if borrower is not NULL and try_to_take(borrower):
                try:
                    keep(<object> borrower)
                finally:
                    give_back(borrower)
        return 0


cdef Slab slab_of(list datagrams):
    """As if one read had brought these bytes; the slab is the caller's."""
    cdef Slab slab = Slab(len(datagrams) or 1, max(map(len, datagrams), default=0) or 1)
    for datagram in datagrams:
        slab.put(datagram)
    slab.users = 1
    slab.take_stock(None)
    return slab


# For every read.

cdef inline Slab spare_slab(Channel channel):
    cdef Slab slab = channel.latest
    if slab is not None and is_idle(slab):
        return slab
    for slab in channel.slabs:
        if is_idle(slab):
            channel.latest = slab
            return slab
    slab = Slab(channel.slots, channel.slot_size)
    if len(channel.slabs) < POOLED_SLABS:
        channel.slabs.append(slab)
        channel.latest = slab
    return slab


# Without Python, whose signal handlers could raise before what was read is in safe hands.
cdef inline void end_reading(Channel channel) noexcept:
    channel.reading -= 1
    if channel.waiters:
        pthread_mutex_lock(&channel.lock)
        channel.ends += 1
        pthread_cond_broadcast(&channel.news)
        pthread_mutex_unlock(&channel.lock)


cdef class Channel:

    def __cinit__(self, int sockfd=-1):
        self.fd = -1
        self.answers = {}
        self.make_locks()
        self.slabs = []
        self.foreign = []
        self.arrived = []
        self.refusals = []
        if sockfd < 0:
            self.fd = check(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER),
                            "cannot open a netlink socket of the netfilter family "
                            "(is the kernel module nfnetlink loaded?)")
        else:
            require_netfilter(sockfd)
            self.fd = duplicate(sockfd)
        if DEBUG:
            add_to_total(&alive_now.descriptors, 1)
        self.connect_to_kernel()

    def __dealloc__(self):
        self.close()
        pthread_cond_destroy(&self.news)
        pthread_mutex_destroy(&self.lock)

    cdef void make_locks(self) noexcept:
        init_condition(&self.news)
        pthread_mutex_init(&self.lock, NULL)

    def connect_to_kernel(self):
        cdef sockaddr_nl address
        cdef socklen_t length = sizeof(address)
        memset(&address, 0, sizeof(address))
        address.nl_family = AF_NETLINK
        if not self.port_id():
            check(bind(self.fd, <sockaddr *> &address, length), "cannot bind the netlink socket")
        # Once connected to port 0, the kernel refuses what other processes send to this socket.
        check(connect(self.fd, <sockaddr *> &address, length), "cannot connect to the kernel")
        # With ENOBUFS, one overrun makes the socket drop all that follows until it is empty.
        set_option(self.fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
        # An error need not bring the whole request back.
        set_option(self.fd, SOL_NETLINK, NETLINK_CAP_ACK, 1)

    cdef uint32_t port_id(self) except? 0:
        """The number under which the kernel knows this socket; 0: it has none yet."""
        cdef sockaddr_nl address
        cdef socklen_t length = sizeof(address)
        check(getsockname(self.fd, <sockaddr *> &address, &length),
              "cannot read the socket's address")
        return address.nl_pid

    cdef int shape(self, unsigned int slots, size_t slot_size) except -1:
        """Decide how many datagrams one read takes at the most, and how long each may be."""
        if slots != self.slots or slot_size != self.slot_size:
            self.forget_slabs()
        self.slots = slots
        self.slot_size = slot_size
        return 0

    cdef int forget_slabs(self) except -1:
        self.slabs = []
        self.latest = None
        return 0

    cdef Slab receive(self, Watch *watch):
        """One read of as many datagrams as there are and fit; the slab is the caller's, who counts
        its users down. Without a watch over signals, or if somebody has made the descriptor
        non-blocking: None where nothing is pending. The caller ends the watch."""
        cdef Slab slab
        cdef int count
        cdef int error = 0
        # First of all: whoever wants to wake this thread looks whether there is a reader.
        self.readers += 1
        try:
            while True:
                PyErr_CheckSignals()
                # Nothing from here to the read lets other code run, which could take the same one.
                slab = spare_slab(self)
                slab.users += 1
                self.reading += 1
                with nogil:
                    count = <int> recvmmsg(self.fd, slab.headers, slab.slots, MSG_DONTWAIT)
                    if (count < 0 and errno == EAGAIN and watch is not NULL
                            and watching(self.fd, watch)):
                        count = receive_one(slab, self.fd)
                    if count < 0:
                        error = errno
                end_reading(self)
                if count > 0:
                    slab.filled = count
                    slab.take_stock(self)
                    return slab
                slab.users -= 1
                if self.fd < 0:
                    return None
                if error == EAGAIN:
                    if watch is NULL or watching(self.fd, watch) and self.never_waits():
                        return None
                    begin_watch(self.fd, watch)
                # What was lost shows in the kernel's counters; report_overruns() has it told here.
                elif error == ENOBUFS:
                    self.overruns += 1
                elif error != EINTR:
                    raise os_error(error, "cannot read from the netlink socket")
        finally:
            self.readers -= 1

    cdef bint never_waits(self) except -1:
        """Somebody has made the descriptor non-blocking."""
        return check(fcntl(self.fd, F_GETFL), "fcntl") & O_NONBLOCK

    cdef Slab receive_until(self, double deadline, Watch *watch):
        """receive(), but None after ``deadline``, on the clock of time.monotonic()."""
        cdef Slab slab
        # All the time, or a wake-up between two of the calls would not be sent.
        self.readers += 1
        try:
            while True:
                slab = self.receive(NULL)
                if slab is not None or self.fd < 0:
                    return slab
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                begin_watch(self.fd, watch)
                # Rounded up, or the last wait would be followed by many that are too short.
                self.await_readable(<int> min(remaining * 1000 + 1, MAX_MILLISECONDS))
        finally:
            self.readers -= 1

    cdef int await_readable(self, int milliseconds) except -1:
        """Wait until there is something to read, or a signal came, or so long."""
        cdef pollfd descriptor
        cdef int result, error
        PyErr_CheckSignals()
        descriptor.fd = self.fd
        descriptor.events = POLLIN
        self.reading += 1
        with nogil:
            result = poll(&descriptor, 1, milliseconds)
            error = errno
        end_reading(self)
        if result < 0 and error != EINTR:
            raise os_error(error, "cannot wait for the netlink socket")
        return 0

    cdef int begin_foreign(self) except -1:
        """Another object's recv() is about to be called, which can run Python code on this thread:
        signal handlers, greenlets."""
        self.readers += 1
        self.reading += 1
        self.foreign.append(threading.get_ident())
        return 0

    cdef int end_foreign(self) except -1:
        self.foreign.remove(threading.get_ident())
        self.readers -= 1
        end_reading(self)
        return 0

    cdef int others_reading(self) except -1:
        return self.reading - self.foreign.count(threading.get_ident())

    cdef int await_readers(self) except -1:
        """Make the other threads that wait in a read return."""
        deadline = time.monotonic() + PATIENCE
        while self.others_reading() > 0 and time.monotonic() < deadline:
            # One message wakes one reader.
            self.wake()
            self.await_news(deadline)
        return 0

    cdef int await_news(self, double deadline) except -1:
        """Wait until another thread's read ends."""
        cdef unsigned int ends
        cdef bint waiting = True
        cdef clock_time until = from_now(
            <int64_t> (max(deadline - time.monotonic(), 0) * 1e9))
        PyErr_CheckSignals()
        self.waiters += 1
        ends = self.ends
        with nogil:
            pthread_mutex_lock(&self.lock)
            while waiting and self.ends == ends:
                waiting = wait_until(&until, &self.news, &self.lock)
            pthread_mutex_unlock(&self.lock)
        self.waiters -= 1
        return 0

    cdef int take(self, const nlmsghdr *message, size_t length) except -1:
        """Note what one of netlink's own messages says."""
        cdef uint32_t sequence = message.nlmsg_seq
        cdef int error
        if message.nlmsg_type != NLMSG_ERROR:
            return 0
        if length < sizeof(nlmsghdr) + sizeof(nlmsgerr):
            self.malformed += 1
            return 0
        error = -(<const nlmsgerr *> &message[1]).error
        if sequence in self.answers:
            self.answers[sequence] = error
        elif error:
            self.refusals.append((sequence, error))
        return 0

    cdef int transmit(self, const nlmsghdr *message) except -1:
        return check(<int> send(self.fd, message, message.nlmsg_len, MSG_NOSIGNAL),
                     "cannot send to the kernel")

    cdef int request(self, nlmsghdr *message) except -1:
        """Send a message that asks for an acknowledgement and return the kernel's errno, 0 for
        success, or UNANSWERED. Other messages that come meanwhile are kept in ``arrived``."""
        cdef uint32_t sequence
        cdef int _attempt
        self.sequence = (self.sequence + 1) & 0x7FFFFFFF or 1
        sequence = self.sequence
        message.nlmsg_seq = sequence
        self.answers[sequence] = None
        try:
            for _attempt in range(TRIES):
                self.transmit(message)
                self.await_answer(sequence)
                if self.answers[sequence] is not None:
                    return self.answers[sequence]
                if self.fd < 0:
                    # A signal handler, or another thread, has closed it.
                    break
            return UNANSWERED
        finally:
            del self.answers[sequence]

    cdef int await_answer(self, uint32_t sequence) except -1:
        # The kernel answers within the send. So either the answer is in the socket, or another
        # thread's read has brought it, or it is lost: to a full receive buffer, or to another
        # process that reads this socket too.
        cdef Slab slab
        deadline = time.monotonic() + PATIENCE
        while self.answers[sequence] is None:
            slab = self.receive(NULL)
            if slab is not None:
                self.keep(slab)
            elif self.answers[sequence] is not None:
                # Another thread handled it before this one came back.
                return 0
            elif self.others_reading() <= 0 or time.monotonic() >= deadline:
                return 0
            else:
                self.await_news(deadline)
        return 0

    cdef int keep(self, Slab slab) except -1:
        if slab.messages:
            self.arrived.append(slab)
        else:
            slab.users -= 1
        return 0

    cdef int discard_pending(self) except -1:
        """Read the socket empty and forget what was in it."""
        cdef Slab slab
        while True:
            slab = self.receive(NULL)
            if slab is None:
                break
            self.arrived.append(slab)
            self.discard_arrived()
        return self.discard_arrived()

    cdef int discard_arrived(self) except -1:
        cdef Slab slab
        for slab in self.arrived:
            slab.users -= 1
        self.arrived.clear()
        return 0

    cdef int wake(self) except -1:
        """Make a blocked reader return, and the socket poll readable: the kernel acknowledges a
        message that asks for nothing else. Safe from any thread and from signal handlers."""
        if self.fd < 0:
            return 0
        check(<int> send_noop(self.fd), "cannot send to the kernel")
        return 0

    cdef int nudge(self) except -1:
        """Make the socket poll readable, if it has not been made so since the latest read."""
        if not self.nudged:
            self.nudged = True
            self.wake()
        return 0

    cdef int forget_threads(self) except -1:
        """After a fork, in the child: the other threads are the parent's."""
        self.readers = self.reading = self.waiters = 0
        # One that such a thread was reading into would never be given back.
        self.forget_slabs()
        self.foreign.clear()
        self.make_locks()
        return 0

    cdef int size_receive_buffer(self, int size) except -1:
        """Ask for a receive buffer of ``size`` bytes and return what the kernel says it is now,
        which is twice what it granted (socket(7))."""
        # SO_RCVBUFFORCE needs CAP_NET_ADMIN outside any user namespace; without it the limit is
        # net.core.rmem_max.
        if setsockopt(self.fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)) < 0:
            set_option(self.fd, SOL_SOCKET, SO_RCVBUF, size)
        return self.receive_buffer()

    cdef int receive_buffer(self) except -1:
        return get_option(self.fd, SOL_SOCKET, SO_RCVBUF)

    cdef int report_overruns(self) except -1:
        """Have the kernel say so when messages did not fit into the receive buffer. The price: it
        then drops all that follow, too, until the buffer has been read empty."""
        return set_option(self.fd, SOL_NETLINK, NETLINK_NO_ENOBUFS, 0)

    cdef uint64_t lost_to_overruns(self) noexcept:
        """How many messages did not fit into the receive buffer, since the socket was opened; once
        it is closed, what was known then."""
        cdef uint32_t numbers[SK_MEMINFO_DROPS + 1]
        cdef socklen_t length = sizeof(numbers)
        if (getsockopt(self.fd, SOL_SOCKET, SO_MEMINFO, numbers, &length) == 0
                and length == sizeof(numbers)):
            self.lost = numbers[SK_MEMINFO_DROPS]
        return self.lost

    cdef int stamp_packets(self, bint on) except -1:
        # The kernel stamps packets only while some socket on the host asks for it.
        set_option(self.fd, SOL_SOCKET, SO_TIMESTAMP, on)
        return 0

    cdef object interface_name(self, uint32_t index):
        """What the interface is called now in the socket's network namespace; None where there is
        none, or no socket any more."""
        cdef ifreq request
        cdef int error
        if self.fd < 0:
            return None
        request.ifr_ifindex = <int> index
        if ioctl(self.fd, SIOCGIFNAME, &request) < 0:
            error = errno
            if error == ENODEV:
                return None
            raise os_error(error, f"cannot look up interface {index}")
        request.ifr_name[sizeof(request.ifr_name) - 1] = 0
        return os.fsdecode(<bytes> request.ifr_name)

    cdef int close(self) except -1:
        cdef int fd = self.fd
        self.lost_to_overruns()
        self.fd = -1
        self.forget_slabs()
        if fd >= 0:
            if DEBUG:
                add_to_total(&alive_now.descriptors, -1)
            forget_socket(fd)
            # Linux has closed the descriptor whatever close() returns.
            close_descriptor(fd)
        return 0


cdef int receive_one(Slab slab, int fd) noexcept nogil:
    """Wait for a datagram; 1, or -1 with errno.

    It is decided the sooner if nobody looks for a second one first: the next read does that.
    """
    cdef long length = recv(fd, slab.vectors[0].iov_base, slab.vectors[0].iov_len, 0)
    if length < 0:
        return -1
    slab.headers[0].msg_len = <unsigned int> length
    return 1


cdef int require_netfilter(int sockfd) except -1:
    if (get_option(sockfd, SOL_SOCKET, SO_DOMAIN) != AF_NETLINK
            or get_option(sockfd, SOL_SOCKET, SO_PROTOCOL) != NETLINK_NETFILTER):
        raise ValueError(f"sockfd {sockfd} is no netlink socket of the netfilter family: open it "
                         "with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)")
    return 0


cdef int duplicate(int sockfd) except -1:
    """Another descriptor of the same socket."""
    return check(fcntl(sockfd, F_DUPFD_CLOEXEC, 0), f"cannot duplicate descriptor {sockfd}")


cdef int get_option(int fd, int level, int name) except -1:
    cdef int value = 0
    cdef socklen_t length = sizeof(value)
    check(getsockopt(fd, level, name, &value, &length), f"cannot use descriptor {fd} as a socket")
    return value


cdef int set_option(int fd, int level, int name, int value) except -1:
    return check(setsockopt(fd, level, name, &value, sizeof(value)),
                 f"cannot set option {name} of the netlink socket")

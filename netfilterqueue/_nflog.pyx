"""``Nflog``: a group of log messages, opened, read and handed out."""
cimport cython
from cpython.object cimport PyTypeObject
from cpython.pyport cimport PY_SSIZE_T_MAX
from libc.errno cimport EBUSY
from libc.stdint cimport uint32_t, uint64_t

from netfilterqueue._channel cimport UNANSWERED, Channel, Slab, datagram_in, duplicate, slab_of
from netfilterqueue._netlink cimport Cursor, next_message, read_be32
from netfilterqueue._nflogdata cimport NflogData, keep, lend
from netfilterqueue._nflogformat cimport (
    ATTRIBUTE_ROOM, REQUEST_WORDS, GroupOptions, encode_bind, encode_unbind, find, is_log, sized,
)
from netfilterqueue._signals cimport Watch, end_watch
from netfilterqueue._threads cimport is_only_reference
from netfilterqueue._uapi cimport (
    NFULA_SEQ, NFULNL_CFG_F_CONNTRACK, NFULNL_CFG_F_SEQ, NFULNL_CFG_F_SEQ_GLOBAL, NLMSG_MIN_TYPE,
    getpid, nlmsghdr,
)

import os
import weakref

from netfilterqueue import aio
from netfilterqueue._advice import open_refused, open_unanswered
from netfilterqueue._arguments import MAX_RECEIVE_BUFFER, integer, require_function
from netfilterqueue.constants import COPY_PACKET


FLAG_SEQ = NFULNL_CFG_F_SEQ
FLAG_SEQ_GLOBAL = NFULNL_CFG_F_SEQ_GLOBAL
FLAG_CONNTRACK = NFULNL_CFG_F_CONNTRACK

# What becomes of ENOBUFS, the kernel's word that messages did not fit into the receive buffer.
ENOBUFS_RAISE = 0
ENOBUFS_HANDLE = 1
ENOBUFS_DISABLE = 2

cdef enum:
    # Datagrams of one read, at the most, and about how many bytes of them.
    SLOTS = 32
    READ_SIZE = 0x20000
    # About what a message takes whose packet is small.
    SMALL_MESSAGE = 256
    LARGEST_RANGE = 65535
    # The kernel's buffer, where nobody asks for another size: never more than this.
    DEFAULT_NLBUF = 8192
    # What the kernel keeps at the end of a buffer (struct skb_shared_info), no more than this.
    BUFFER_RECORD = 1024


class NflogError(Exception):
    """What the others derive from."""

    __module__ = "netfilterqueue.nflog"


class NflogDroppedError(NflogError):
    """The receive buffer was full, and messages were dropped (ENOBUFS_RAISE)."""

    __module__ = "netfilterqueue.nflog"


class NflogClosedError(NflogError):
    """The handle is closed, and all messages that it had read have been handed out."""

    __module__ = "netfilterqueue.nflog"


class NflogRetryError(NflogError):
    """Never raised: what was interrupted is taken up again. For programs that catch it."""

    __module__ = "netfilterqueue.nflog"


cdef Slab compacted(Slab slab):
    """A copy that takes no more memory than its datagrams, in its place."""
    cdef Cursor cursor
    cdef int slot
    cdef list datagrams = []
    try:
        for slot in range(slab.filled):
            cursor = datagram_in(slab, slot)
            datagrams.append(cursor.at[:cursor.left])
        return slab_of(datagrams)
    finally:
        slab.users -= 1


@cython.final
cdef class Nflog:
    """A group of log messages, from iptables' target NFLOG or nftables' statement log.

    ``open()`` makes these objects. Messages are read several at a time, and handed out one by one:
    by iteration, ``next``, ``loop``, or ``async for``. As a context manager it closes itself.
    """

    def __cinit__(self):
        # First of all: where no socket can be opened, there is nothing to close.
        self.closed = True
        self.channel = Channel()
        self.waiting = []
        self.lent = []

    def __init__(self, *args, **kwargs):
        raise TypeError("handles are made by netfilterqueue.nflog.open()")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __del__(self):
        # A forked child can still have the socket.
        self.close()

    # Opening and closing

    cdef int configure(self, options) except -1:
        """Bind the group and carry out what open() was asked for."""
        cdef uint32_t request[REQUEST_WORDS]
        cdef GroupOptions wanted
        cdef size_t longest = 0
        cdef int error
        wanted.copy_mode = options.copymode
        wanted.copy_range = options.range
        wanted.nlbuf = options.nlbuf
        wanted.timeout = options.timeout
        wanted.qthresh = options.qthresh
        wanted.flags = options.flags
        if options.copymode == COPY_PACKET:
            longest = options.range or LARGEST_RANGE
        nlbuf = options.nlbuf or DEFAULT_NLBUF
        self.channel.shape(slots_for(min(options.qthresh * SMALL_MESSAGE, nlbuf)),
                           longest_datagram(max(nlbuf, ATTRIBUTE_ROOM + longest)))
        if options.rcvbuf:
            self.channel.size_receive_buffer(options.rcvbuf)
        self.group = options.group
        self.sequenced = wanted.flags & NFULNL_CFG_F_SEQ
        self.raises_overruns = options.enobufs == ENOBUFS_RAISE
        error = self.channel.request(encode_bind(request, self.group, &wanted))
        if error == UNANSWERED:
            raise open_unanswered(self.group)
        # EBUSY: this socket has it already. The answer to the first try was lost.
        if error and error != EBUSY:
            raise open_refused(self.group, error)
        self.opened_by = getpid()
        self.closed = False
        if options.enobufs != ENOBUFS_DISABLE:
            # Not before: without it, the kernel's answer fits as soon as there is room.
            self.channel.report_overruns()
        self.take_arrived()
        return 0

    def close(self):
        """Give the group up and close the socket. Idempotent, and can be called from any thread.

        Messages that have been read can still be handed out; loops end after them. In a forked
        child it closes the child's descriptor and leaves the group to the parent.
        """
        with cython.critical_section(self.channel):
            if self.closed:
                return
            self.closed = True
            try:
                # The kernel does so by itself with the socket's last descriptor, which a forked
                # child may have; in a child, the group is the parent's.
                if self.opened_by == getpid():
                    self.release_group()
                self.channel.await_readers()
            finally:
                self.channel.close()

    cdef int release_group(self) except -1:
        cdef uint32_t request[REQUEST_WORDS]
        cdef nlmsghdr *message = encode_unbind(request, self.group)
        if self.channel.readers > 0:
            # The answer wakes the reader: waiting for it here would be waiting for the other.
            self.channel.transmit(message)
        else:
            self.channel.request(message)
            self.take_arrived()
        return 0

    cdef int take_arrived(self) except -1:
        cdef list arrived = self.channel.arrived
        self.channel.arrived = []
        for slab in arrived:
            self.take(slab)
        return self.show_readable()

    # What it is

    def fileno(self):
        """The socket's descriptor: it is readable when there are messages. Raises ValueError once
        the handle is closed."""
        if self.closed:
            raise ValueError("this handle is closed: open the group again")
        return self.channel.fd

    def getfd(self):
        """The same, but None once the handle is closed."""
        return None if self.closed else self.channel.fd

    def getgroup(self):
        """The number of the group."""
        return self.group

    @property
    def rcvbuf(self):
        """The size of the receive buffer in bytes; None once the handle is closed. It can be set,
        within the limits that open() tells."""
        # Linux doubles what it is asked for (socket(7)).
        with cython.critical_section(self.channel):
            return None if self.closed else self.channel.receive_buffer() // 2

    @rcvbuf.setter
    def rcvbuf(self, size):
        cdef int wanted
        self.fileno()
        wanted = integer("rcvbuf", size, 1, MAX_RECEIVE_BUFFER)
        with cython.critical_section(self.channel):
            self.channel.size_receive_buffer(wanted)

    @property
    def drops(self):
        """How often the kernel said that messages did not fit into the receive buffer, and were
        dropped (ENOBUFS). It can be set, to 0."""
        return self.drop_count

    @drops.setter
    def drops(self, value):
        if value != 0:
            raise TypeError("drops can be set to 0 only")
        self.drop_count = 0

    @property
    def lost(self):
        """How many messages were missed before the one handed out last, by the gaps between their
        numbers; None without FLAG_SEQ."""
        return self.missed if self.sequenced else None

    # Handing out

    def queue(self, wait=True):
        """Read messages and queue them here; return how many. With ``wait``, until there are some:
        then 0 means that stop() or close() was called.

        Raises NflogDroppedError (ENOBUFS_RAISE) and OSError if reading fails.
        """
        cdef uint64_t before
        with cython.critical_section(self.channel):
            before = self.queued
            if not wait:
                self.read(False)
                return self.queued - before
            self.enter()
            try:
                while self.queued == before and not self.stopping and self.read(True):
                    pass
                return self.queued - before
            finally:
                self.leave()

    def next(self, wait=True):
        """The next message. None if there is none: with ``wait``, only after stop().

        Raises as queue() does, and NflogClosedError where waiting is in vain.
        """
        cdef NflogData data
        with cython.critical_section(self.channel):
            if not wait:
                data = self.await_message(False)
                self.show_readable()
                return data
            self.enter()
            try:
                data = self.await_message(True)
            finally:
                self.leave()
                self.show_readable()
            if data is None and self.closed:
                raise NflogClosedError("this handle is closed: open the group again")
            return data

    def loop(self, fn, count=-1):
        """Call ``fn`` with each message: ``count`` of them, or, if it is -1, until stop() or
        close().

        What ``fn`` raises leaves the loop; the messages read with the one concerned come next.
        Raises as queue() does.
        """
        cdef NflogData data
        cdef Py_ssize_t wanted = integer("count", count, -1, PY_SSIZE_T_MAX)
        require_function("fn", fn, "the message")
        with cython.critical_section(self.channel):
            self.enter()
        try:
            while wanted:
                with cython.critical_section(self.channel):
                    data = self.await_message(True)
                if data is None:
                    break
                wanted -= wanted > 0
                # Outside of the critical section, as it may take its time.
                fn(data)
        finally:
            with cython.critical_section(self.channel):
                self.leave()
                self.show_readable()

    def __iter__(self):
        """Each message, until stop() or close(). Raises as queue() does."""
        return Messages(self)

    def __aiter__(self):
        """Each message, on asyncio and on trio, until stop() or close()."""
        return aio.Packets(Messages(self))

    def stop(self):
        """End what waits for messages, and loops, after the message at hand. If nothing is under
        way, the next one ends at once. Can be called from any thread and from signal handlers."""
        with cython.critical_section(self.channel):
            self.stopping = True
            if self.channel.readers > 0:
                self.channel.wake()

    cdef int enter(self) except -1:
        self.runners += 1
        return 0

    cdef int leave(self) except -1:
        # In a forked child those of other threads are not there, nor is this thread's counted.
        self.runners -= self.runners > 0
        if not self.runners:
            self.stopping = False
        elif self.stopping:
            # One message wakes one reader: pass it on to the next.
            self.channel.wake()
        return 0

    cdef int show_readable(self) except -1:
        """Have the socket poll readable while messages wait here: event loops watch nothing
        else."""
        if self.queued and not self.closed:
            self.channel.nudge()
        return 0

    cdef NflogData await_message(self, bint wait):
        """The next message that has been read or can be, or None."""
        cdef NflogData data = None
        while data is None and self.fill(wait):
            data = self.next_read()
        return data

    cdef bint fill(self, bint wait) except -1:
        """Read until there are messages to hand out. False: there will be none."""
        while not (wait and self.stopping):
            if self.queued:
                return True
            if not self.read(wait):
                return False
        return False

    cdef int read(self, bint wait) except -1:
        """Read once; 0 where nothing is pending or the handle is closed."""
        cdef Slab slab
        cdef Watch watch
        if self.closed:
            return 0
        watch.begun = False
        try:
            slab = self.channel.receive(&watch if wait else NULL)
        finally:
            end_watch(&watch)
        if slab is not None:
            self.take(slab)
        self.note_overruns()
        return slab is not None

    cdef int take(self, Slab slab) except -1:
        """Queue what a read has brought."""
        # Nobody answers for these: they are of messages that make a socket readable.
        self.channel.refusals.clear()
        if not slab.messages:
            slab.users -= 1
            return 0
        # A slab is large; whoever reads on without taking messages need not hold many.
        if self.waiting:
            slab = compacted(slab)
        self.waiting.append(slab)
        self.queued += slab.messages
        return 0

    cdef NflogData next_read(self):
        """The next of the messages that have been read, or None."""
        cdef const nlmsghdr *message
        cdef size_t length
        cdef NflogData data
        while self.remaining or self.begin_slab():
            message = next_message(&self.rest, &length)
            if message is NULL:
                self.begin_datagram(self.slot + 1)
                continue
            if message.nlmsg_type < NLMSG_MIN_TYPE:
                continue
            self.remaining -= 1
            self.queued -= 1
            data = self.hand_out(message, length) if is_log(message) else None
            if not self.remaining:
                self.end_slab()
            if data is not None:
                return data
        return None

    cdef NflogData hand_out(self, const nlmsghdr *message, size_t length):
        cdef NflogData data
        if self.sequenced:
            self.note_seq(message, length)
        # A loop still names one message while it asks for the next: what it had before that one
        # is, mostly, nobody's, and serves again, as zip() does it with its tuples.
        if self.older is not None and is_only_reference(<void *> self.older):
            data = self.older
            data.message = message
            data.length = length
        else:
            data = lend(self.channel, self.slab, message, length)
        self.older = self.newer
        self.newer = data
        return data

    cdef bint begin_slab(self) except -1:
        cdef Slab slab
        if not self.waiting:
            return False
        slab = self.waiting[0]
        if slab in self.lent:
            self.lent.remove(slab)
        # Programs still name the latest message while they wait for the next: only those that
        # outlive that one's read too take copies.
        while len(self.lent) > 1:
            (<Slab> self.lent.pop(0)).settle(keep)
        self.lent.append(slab)
        self.slab = self.waiting.pop(0)
        self.remaining = self.slab.messages
        self.begin_datagram(0)
        return True

    cdef int begin_datagram(self, int slot) except -1:
        self.slot = slot
        self.rest = datagram_in(self.slab, slot)
        self.begins = True
        return 0

    cdef int end_slab(self) except -1:
        self.older = self.newer = None
        self.slab.users -= 1
        self.slab = None
        return 0

    cdef int note_seq(self, const nlmsghdr *message, size_t length) noexcept:
        """Count what is missing before this message. Datagrams get lost, and not messages in the
        midst of one: so only the number of the first is looked at."""
        cdef uint32_t seq
        cdef const char *value
        if not self.begins:
            self.next_seq += 1
            return 0
        self.begins = False
        value = sized(find(message, length, NFULA_SEQ), sizeof(uint32_t))
        if value is NULL:
            return 0
        seq = read_be32(value)
        # The numbers begin with 0 when the group is bound, and again after 2**32 - 1.
        self.missed += <uint32_t> (seq - self.next_seq)
        self.next_seq = seq + 1
        return 0

    cdef int note_overruns(self) except -1:
        cdef uint64_t more = self.channel.overruns - self.overruns
        if more:
            self.overruns += more
            self.drop_count += more
            if self.raises_overruns:
                raise NflogDroppedError(
                    "the receive buffer was full, and messages were dropped (ENOBUFS): read "
                    "faster, or open with a larger rcvbuf, a greater qthresh or a smaller range")
        return 0

    cdef int forget_messages(self) except -1:
        cdef Slab slab
        if self.remaining:
            self.remaining = 0
            self.end_slab()
        for slab in self.waiting:
            slab.users -= 1
        self.waiting.clear()
        self.queued = 0
        return 0

    cdef int begin_in_child(self) except -1:
        # What the parent has read, the parent hands out.
        self.forget_messages()
        self.channel.forget_threads()
        self.runners = 0
        return 0


@cython.final
cdef class Messages:
    """One ``for`` or ``async for`` over a handle; what aio builds on."""
    cdef Nflog nflog
    cdef bint closed

    def __cinit__(self, Nflog nflog not None):
        self.nflog = nflog
        with cython.critical_section(nflog.channel):
            nflog.enter()

    def __iter__(self):
        return self

    def __next__(self):
        cdef NflogData data = None
        with cython.critical_section(self.nflog.channel):
            if not self.closed:
                data = self.nflog.await_message(True)
        if data is None:
            self.close()
            raise StopIteration
        return data

    @property
    def ended(self):
        """No message will come any more: stop() or close() was called."""
        with cython.critical_section(self.nflog.channel):
            return self.has_ended()

    cdef bint has_ended(self) noexcept:
        return (self.closed or self.nflog.stopping
                or (self.nflog.closed and not self.nflog.queued))

    def begin_waiting(self):
        """A descriptor to wait for, to be given to end_waiting(); -1 if no message will come.

        One for each who waits, as event loops ask for; and it hears of the end although the handle
        has closed its own.
        """
        with cython.critical_section(self.nflog.channel):
            if self.has_ended():
                return -1
            descriptor = duplicate(self.nflog.channel.fd)
            # stop() and close() wake who waits in an event loop, too.
            self.nflog.channel.readers += 1
            return descriptor

    def end_waiting(self, int descriptor):
        with cython.critical_section(self.nflog.channel):
            # In a forked child, those who wait are the parent's.
            self.nflog.channel.readers -= self.nflog.channel.readers > 0
        os.close(descriptor)

    def take(self):
        """The next message of those that have been read, or None."""
        with cython.critical_section(self.nflog.channel):
            return None if self.has_ended() else self.nflog.next_read()

    def read(self):
        """The next message of those that have been read or can be, or None."""
        cdef NflogData data
        with cython.critical_section(self.nflog.channel):
            data = self.nflog.await_message(False)
            if self.nflog.channel.readers > 0:
                # Other tasks wait for the socket, and the rest is no longer in it.
                self.nflog.show_readable()
            return data

    def close(self):
        with cython.critical_section(self.nflog.channel):
            if not self.closed:
                self.closed = True
                self.nflog.leave()
                self.nflog.show_readable()

    def __del__(self):
        # Without a handle it has not begun.
        if self.nflog is not None:
            self.close()


cdef size_t longest_datagram(size_t asked) noexcept:
    """The kernel makes its buffer as large as asked, or as one message needs, and then uses what
    its allocator gives beyond that: up to the next power of two, its own record included."""
    cdef size_t size = 4096
    while size < asked + BUFFER_RECORD:
        size *= 2
    return size


cdef unsigned int slots_for(size_t size) noexcept:
    """How many datagrams of this size, usually, one read should take."""
    cdef unsigned int slots = SLOTS
    while slots > 1 and slots * size > <size_t> READ_SIZE:
        slots //= 2
    return slots


def open_group(options):
    """The Nflog for options that have been checked."""
    cdef Nflog nflog = Nflog.__new__(Nflog)
    nflog.configure(options)
    live_handles.add(nflog)
    return nflog


def messages_from(datagrams):
    """Decode datagrams, bytes-like objects, as if one read had brought them.

    Returns the list of their messages, and how many are missing between them: this is how the wire
    format is tested without a kernel.
    """
    cdef Nflog nflog = Nflog.__new__(Nflog)
    cdef list messages = []
    nflog.sequenced = True
    nflog.take(slab_of([bytes(memoryview(datagram)) for datagram in datagrams]))
    while (data := nflog.next_read()) is not None:
        messages.append(data)
    return messages, nflog.missed


live_handles = weakref.WeakSet()


def begin_in_child():
    cdef Nflog nflog
    for nflog in list(live_handles):
        nflog.begin_in_child()


os.register_at_fork(after_in_child=begin_in_child)

# Users know the class by the public module's name.
(<PyTypeObject *> Nflog).tp_name = b"netfilterqueue.nflog.Nflog"

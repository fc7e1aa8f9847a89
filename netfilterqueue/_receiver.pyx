"""``Receiver``: packets read and not handed out yet, and the ends of waiting for more."""
cimport cython
from cpython.bytes cimport PyBytes_CheckExact
from cpython.exc cimport PyErr_CheckSignals
from cpython.pyport cimport PY_SSIZE_T_MAX
from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EAGAIN, ENOBUFS
from libc.stdint cimport uint32_t

from netfilterqueue._channel cimport Channel, Slab, duplicate, is_idle
from netfilterqueue._outbox cimport VERDICTS, Outbox, is_verdict, unsettled
from netfilterqueue._packet cimport Batch, Packet, is_free, new_batch
from netfilterqueue._signals cimport end_watch
from netfilterqueue._uapi cimport close

import time

from netfilterqueue._arguments import MAX_TIMEOUT, integer, seconds

cdef enum:
    # What a loop does next.
    HAND_OUT
    READ
    LEAVE


cdef Limits limits_of(block, timeout, count) except *:
    cdef Limits limits
    limits.wanted = PY_SSIZE_T_MAX if count is None else integer("count", count, 1, PY_SSIZE_T_MAX)
    limits.emptied = limits.watch.begun = False
    limits.waits = bool(block)
    limits.timed = timeout is not None
    limits.deadline = 0
    if limits.timed:
        timeout = seconds("timeout", timeout, MAX_TIMEOUT)
        limits.waits = limits.waits and timeout > 0
        limits.deadline = time.monotonic() + timeout
    return limits


# For every packet: not methods, which would not be compiled into their callers.

cdef inline bint stopped(Receiver queue, const Limits *limits) noexcept:
    return queue.stops != limits.stops


cdef inline int next_step(Receiver queue, Outbox outbox, const Limits *limits) except -1:
    while not (stopped(queue, limits) or outbox.closed):
        if queue.first is not None:
            return HAND_OUT
        if not unsettled(outbox):
            return READ
        outbox.raise_late_error()
        # While it sends, another thread may call stop().
        outbox.flush()
    return LEAVE


cdef inline int append(Receiver queue, Batch batch) except -1:
    if queue.first is None:
        queue.first = batch
    else:
        queue.last.following = batch
    queue.last = batch
    return 0


cdef inline int drop_first(Receiver queue) except -1:
    cdef Batch dropped = queue.first
    queue.first = dropped.following
    # A packet that is held keeps its batch, and must not keep all that came later with it.
    dropped.following = None
    return 0


cdef Packet next_packet(Receiver queue):
    """The next of the packets that have been read, or None."""
    cdef Batch batch
    cdef Packet packet
    cdef Packet used = queue.spare
    queue.spare = None
    if used is not None and not is_free(used):
        # Somebody has found it among all objects, as leak finders do. Or, without a GIL, another
        # thread made it: it would not end before that one runs, with its default verdict.
        used = None
    while queue.first is not None:
        batch = queue.first
        packet = batch.next(used, queue, &queue.tally)
        if not batch.remaining and queue.first is batch:
            drop_first(queue)
        if packet is not None:
            return packet
    return None


cdef int take(Receiver queue, Slab slab, Outbox outbox) except -1:
    """Queue what a read has brought for delivery."""
    if outbox is not None and outbox.closed:
        # A signal handler has unbound the queue, and perhaps bound it again, before the read.
        outbox = queue.outbox
    if outbox is None:
        slab.users -= 1
        return 0
    if slab.messages:
        queue.tally.batches += 1
        append(queue, new_batch(slab, outbox, queue.last if queue.first is None else None))
        if slab.messages > 1:
            outbox.start_helper()
    else:
        slab.users -= 1
    if queue.channel.refusals:
        queue.note_refusals(outbox)
    return 0


cdef inline Slab read_socket(Channel channel, Limits *limits):
    if not limits.waits:
        return channel.receive(NULL)
    if limits.timed:
        return channel.receive_until(limits.deadline, &limits.watch)
    return channel.receive(&limits.watch)


cdef inline bint fill(Receiver queue, Outbox outbox, Limits *limits) except -1:
    """Read until there are packets to hand out. False: there will be none, and it is time to
    leave."""
    cdef Slab slab
    cdef int step
    while True:
        step = next_step(queue, outbox, limits)
        if step != READ:
            return step == HAND_OUT
        slab = None if limits.emptied else read_socket(queue.channel, limits)
        if slab is None:
            return False
        if not limits.waits:
            # The last read is one that does not fill its slab; a flood fills all.
            limits.pending -= slab.messages
            limits.emptied = slab.filled < <int> slab.slots or limits.pending <= 0
        take(queue, slab, outbox)


cdef class Receiver:

    def __cinit__(self):
        self.verdict_errors = {}
        self.pulled = []
        self.awaiting = []
        self.runners = []

    cdef int require_open(self) except -1:
        if self.is_closed:
            raise ValueError("this queue is closed: make a new NetfilterQueue")
        return 0

    cdef int require_bound(self) except -1:
        self.require_open()
        if self.outbox is None:
            raise RuntimeError("no queue is bound: call bind() first")
        return 0

    @cython.critical_section
    cdef Outbox enter(self, Limits *limits):
        """Begin a call. Enters the critical section."""
        self.require_bound()
        limits.pending = self.max_len
        # A stop() that no call has ended by is for this one.
        limits.stops = self.heard
        limits.thread = PyThread_get_thread_ident()
        self.runners.append(limits.thread)
        return self.outbox

    @cython.critical_section
    cdef int leave(self, Outbox outbox, Limits *limits, list packets) except -1:
        """End a call; ``packets``: what it returns, or None. Enters the critical section."""
        end_watch(&limits.watch)
        take_out(self.runners, limits.thread)
        if self.runners and (stopped(self, limits) or outbox.closed):
            # One message wakes one reader: pass it on to the next.
            self.channel.wake()
        if not packets:
            # Whoever reads in a loop ends it when a read returns none: a stop() that comes while
            # one returns some is for the next.
            self.heard = self.stops
        if not outbox.closed:
            if self.first is not None:
                # They are no longer in the socket, and event loops watch nothing else.
                self.channel.nudge()
            outbox.flush()
        return 0

    cdef int leave_with(self, list packets, Outbox outbox, Limits *limits) except -1:
        """leave(), but what would cost the caller these packets is raised by a later call."""
        try:
            return self.leave(outbox, limits, packets)
        except OSError as error:
            if not packets:
                raise
            outbox.postpone(error.errno)
            return 0

    @cython.critical_section
    cdef Packet await_packet(self, Outbox outbox, Limits *limits, bint to_keep):
        """The next packet; None when it is time to leave. ``to_keep``: not for a callback. Enters
        the critical section."""
        cdef Packet packet = None
        while packet is None and fill(self, outbox, limits):
            packet = self.pull() if to_keep else next_packet(self)
        return packet

    @cython.critical_section
    cdef int take_back(self, Packet packet) except -1:
        """Its callback has returned. Enters the critical section."""
        if packet.renew():
            self.spare = packet
        return 0

    cdef Packet await_through(self, sock, Outbox outbox, Limits *limits):
        """The next packet, read through a socket object; None if nothing is pending there, or it is
        time to leave. Enters the critical section, but not while that object's code runs."""
        cdef Packet packet
        cdef bytes datagram
        cdef int step
        while True:
            # No `continue` in it: Cython would keep a reference.
            with cython.critical_section(self):
                step = next_step(self, outbox, limits)
                if step == LEAVE:
                    return None
                packet = next_packet(self) if step == HAND_OUT else None
                if packet is not None:
                    return packet
                if step != HAND_OUT:
                    self.channel.begin_foreign()
            if step == HAND_OUT:
                continue
            datagram = self.receive_from(sock)
            if datagram is None:
                continue
            if not datagram:
                return None
            with cython.critical_section(self):
                take(self, self.borrow(datagram), outbox)

    cdef Slab borrow(self, bytes datagram):
        """A slab around what somebody else received."""
        if self.borrowed is None or not is_idle(self.borrowed):
            self.borrowed = Slab(1, 0)
        self.borrowed.users += 1
        self.borrowed.lend(datagram)
        self.borrowed.take_stock(self.channel)
        return self.borrowed

    cdef bytes receive_from(self, sock):
        """A datagram; empty if nothing is pending, None after an overrun. Ends what begin_foreign()
        began."""
        try:
            # While there are packets, recv() neither waits nor looks whether a signal came.
            PyErr_CheckSignals()
            datagram = sock.recv(self.channel.slot_size)
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno == EAGAIN:
                return b""
            if error.errno == ENOBUFS:
                return None
            raise
        finally:
            with cython.critical_section(self):
                self.channel.end_foreign()
        if PyBytes_CheckExact(datagram):
            return datagram
        return bytes(memoryview(datagram))

    cdef int take_arrived(self) except -1:
        cdef list arrived = self.channel.arrived
        self.channel.arrived = []
        for slab in arrived:
            take(self, slab, self.outbox)
        return 0

    cdef int end_binding(self) except -1:
        """Close the outbox, and take over what it has counted."""
        cdef int kind
        # Held beyond the last line: its end lets other threads run, which must not meet it here.
        cdef Outbox ending = self.outbox
        self.ending = ending
        self.outbox = None
        try:
            ending.close()
        finally:
            for kind in range(VERDICTS):
                self.given[kind] += ending.waiting.given[kind]
            self.abandoned += ending.waiting.abandoned
            self.ending = None
        return 0

    # Over all bindings. Between what is added here nothing lets other threads run.

    cdef uint64_t verdicts_given(self, int kind) noexcept:
        cdef uint64_t number = self.given[kind]
        if self.outbox is not None:
            number += self.outbox.waiting.given[kind]
        if self.ending is not None:
            number += self.ending.waiting.given[kind]
        return number

    cdef uint64_t packets_abandoned(self) noexcept:
        cdef uint64_t number = self.abandoned
        if self.outbox is not None:
            number += self.outbox.waiting.abandoned
        if self.ending is not None:
            number += self.ending.waiting.abandoned
        return number

    cdef int note_refusals(self, Outbox outbox) except -1:
        """Count what the kernel refused; None: the verdicts were an earlier binding's."""
        cdef uint32_t sequence
        cdef int error
        cdef list refusals = self.channel.refusals
        self.channel.refusals = []
        for sequence, error in refusals:
            if is_verdict(sequence):
                self.verdict_errors[error] = self.verdict_errors.get(error, 0) + 1
                if outbox is not None:
                    outbox.refused(sequence, error)
            else:
                self.request_errors += 1
        return 0

    cdef int forget_batches(self) except -1:
        while self.first is not None:
            self.first.end()
            drop_first(self)
        # It would serve again, for another outbox; and to let go of the last reference to an outbox
        # lets other threads run, in the midst of take().
        self.last = None
        return 0

    cdef bint have_several(self) noexcept:
        """Whether more than one packet waits to be handed out."""
        return self.first is not None and (self.first.remaining > 1
                                           or self.first.following is not None)

    cdef Packet pull(self):
        """The next of the packets that have been read, or None; its bytes are lent to it."""
        cdef Packet packet
        cdef Slab slab
        if (self.awaiting or self.channel.reading > 0) and self.have_several():
            # Whoever waits for the socket takes the others while this one is being looked at. Told
            # first, as an error of this would lose a packet taken before.
            self.channel.nudge()
        packet = next_packet(self)
        if packet is None:
            return None
        if not self.pulled or self.pulled[-1] is not packet.slab:
            # Programs still name the packets of one read while they wait for the next: only those
            # that outlive that one too take copies.
            while len(self.pulled) > 1:
                slab = self.pulled.pop(0)
                slab.settle(keep)
                slab.users -= 1
            self.pulled.append(packet.slab)
            packet.slab.users += 1
        packet.place = packet.slab.lend_to(<void *> packet)
        return packet


cdef int take_out(list numbers, number) except -1:
    # In a forked child, what belongs to other threads is not there.
    if number in numbers:
        numbers.remove(number)
    return 0


cdef int keep(object packet) except -1:
    return (<Packet> packet).keep_payload()


# What its queue's critical section guards besides.
@cython.final
cdef class Pulling:

    def __cinit__(self, Receiver queue not None):
        self.closed = True
        self.queue = queue
        self.limits = limits_of(False, None, None)
        self.outbox = queue.enter(&self.limits)
        self.closed = False

    @property
    def ended(self):
        """No packet will come any more: stop() or unbind() was called."""
        with cython.critical_section(self.queue):
            return self.has_ended()

    cdef bint has_ended(self) noexcept:
        return self.closed or stopped(self.queue, &self.limits) or self.outbox.closed

    def begin_waiting(self):
        """A descriptor to wait for, to be given to end_waiting(); -1 if no packet will come.

        One for each who waits, as event loops ask for; and it hears of the end although the queue
        has closed its own.
        """
        cdef int descriptor
        with cython.critical_section(self.queue):
            if self.has_ended():
                return -1
            descriptor = duplicate(self.queue.channel.fd)
            self.queue.awaiting.append(descriptor)
        return descriptor

    def end_waiting(self, int descriptor):
        with cython.critical_section(self.queue):
            take_out(self.queue.awaiting, descriptor)
        close(descriptor)

    def take(self):
        """The next packet of those that have been read, or None."""
        with cython.critical_section(self.queue):
            return None if self.has_ended() else self.queue.pull()

    def read(self):
        """The next packet of those that have been read or can be, or None."""
        with cython.critical_section(self.queue):
            self.limits.emptied = False
            return self.queue.await_packet(self.outbox, &self.limits, True)

    def close(self, list packets=None):
        """``packets``: in the caller's hands, to be lost if this raises."""
        with cython.critical_section(self.queue):
            if not self.closed:
                self.closed = True
                self.queue.leave_with(packets, self.outbox, &self.limits)

    def __del__(self):
        # Without a queue it has not begun.
        if self.queue is not None:
            self.close()

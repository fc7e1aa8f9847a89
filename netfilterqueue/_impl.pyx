"""``NetfilterQueue``: a queue bound, run and stopped."""
from cpython.bytes cimport PyBytes_CheckExact
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyTypeObject
from libc.errno cimport EAGAIN, ENOBUFS, ENODEV
from libc.stdint cimport uint32_t, uint64_t
from posix.types cimport pid_t

from netfilterqueue._channel cimport BUFFER_SIZE as COMPILED_BUFFER_SIZE
from netfilterqueue._channel cimport UNANSWERED, Channel, Slab
from netfilterqueue._nfqueue cimport ATTRIBUTE_ROOM, REQUEST_WORDS, encode_bind, encode_unbind
from netfilterqueue._outbox cimport Outbox, is_verdict
from netfilterqueue._packet cimport Batch, Packet, Tally, new_batch
from netfilterqueue._uapi cimport MSG_DONTWAIT, getpid, nlmsghdr

import atexit
import contextlib
import os
import socket
import threading
import warnings
import weakref

from netfilterqueue import constants
from netfilterqueue._advice import bind_refused, bind_unanswered, unbind_refused
from netfilterqueue._arguments import MAX_INT, check_bind, integer
from netfilterqueue.constants import Verdict

BUFFER_SIZE = COMPILED_BUFFER_SIZE

# The verdicts that no callback can return.
cdef uint32_t STOLEN = Verdict.STOLEN
cdef uint32_t QUEUE = Verdict.QUEUE

# The longest payload that a packet can have.
cdef enum:
    LARGEST_RANGE = 65535


cdef class NetfilterQueue:
    """A queue of packets that iptables' NFQUEUE target (or nftables' queue) hands to this program.

    ``bind`` to a queue number, ``run`` a callback for each packet, ``unbind``. In a subclass,
    overriding ``handle`` does instead of a callback. As a context manager it closes itself.

    ``sockfd``: a netlink socket of the netfilter family that somebody else opened, perhaps in
    another network namespace; a duplicate of it is used. ``af`` is there for programs that pass
    it: the kernel has long since ceased to tell queues by address family.

    Raises OSError if no socket can be opened and ValueError if ``sockfd`` is not such a socket.
    """

    COPY_NONE = constants.COPY_NONE
    COPY_META = constants.COPY_META
    COPY_PACKET = constants.COPY_PACKET

    cdef object __weakref__
    cdef Channel channel        # None until it is needed: a subclass may never call __init__
    cdef bint adopted           # its socket is somebody else's, perhaps of another namespace
    cdef bint is_closed
    cdef object transition      # RLock: bind, unbind and close, one at a time
    cdef Outbox outbox          # of the present binding; None: not bound
    cdef int queue_num
    cdef pid_t bound_by         # a forked child must not unbind its parent's queue
    cdef object callback        # None: handle()
    cdef Batch first            # batches with packets that wait to be delivered, a linked list
    cdef Batch last
    cdef int runners            # calls of run() and run_socket() under way
    cdef bint stopping
    cdef Tally tally
    cdef uint64_t verdict_errors
    cdef uint64_t request_errors

    def __cinit__(self, *args, **kwargs):
        # Reentrant, for signal handlers that unbind.
        self.transition = threading.RLock()
        live_queues[id(self)] = self

    def __init__(self, *, af=socket.AF_INET, sockfd=-1):
        descriptor = integer("sockfd", sockfd, -1, MAX_INT)
        if self.channel is not None:
            raise RuntimeError("this queue has a socket already: call __init__ once, and first")
        self.channel = Channel(descriptor)
        self.adopted = descriptor >= 0

    def __del__(self):
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    # The socket

    def get_fd(self):
        """The descriptor of the socket that packets come from, also before bind(). Wait until it
        is readable, then call run(block=False). Raises ValueError once the queue is closed."""
        return self.open_channel().fd

    def fileno(self):
        """The same as get_fd(), for select(), selectors and event loops."""
        return self.open_channel().fd

    cdef Channel open_channel(self):
        self.require_open()
        if self.channel is None:
            self.channel = Channel()
        return self.channel

    cdef int require_open(self) except -1:
        if self.is_closed:
            raise ValueError("this queue is closed: make a new NetfilterQueue")
        return 0

    # Binding

    def bind(self, queue_num, user_callback=None, max_len=1024, mode=constants.COPY_PACKET,
             range=65535, sock_len=2455552, *, callback=None, timestamps=True, batch=32,
             verdict_delay=0.001):
        """Bind the queue ``queue_num`` (0 to 65535) and configure it, in one request.

        ``user_callback`` (or ``callback``)
            is called with each Packet; without one, handle() must be overridden. A Verdict that it
            returns is given to the packet, if it has none yet.
        ``max_len``
            Packets that may wait for a verdict; the kernel drops what comes on top
            (NFQA_CFG_QUEUE_MAXLEN).
        ``mode``, ``range``
            What is copied of each packet: nothing (COPY_NONE: the kernel drops them all), metadata
            (COPY_META), or also up to ``range`` bytes of payload (COPY_PACKET), 0 for all
            (NFQA_CFG_PARAMS).
        ``sock_len``
            Bytes of the socket's receive buffer; a RuntimeWarning says when there are fewer.
        ``timestamps``
            Have the kernel stamp packets on the PREROUTING, INPUT and FORWARD hooks.
        ``batch``, ``verdict_delay``
            Packets taken by one read at the most (1 to 1024), and seconds for which a verdict may
            wait for those of the other packets of its read. With 1, or 0, each is sent at once.

        Raises ValueError or TypeError for a wrong argument, RuntimeError if this object is bound
        already, OSError if the number is taken and PermissionError without CAP_NET_ADMIN. After
        an error the queue is not bound.
        """
        binding = check_bind(queue_num, user_callback, max_len, mode, range, sock_len, callback,
                             timestamps, batch, verdict_delay)
        if binding.callback is None and type(self).handle is NetfilterQueue.handle:
            raise TypeError("bind() needs a callback: pass one, or override handle() in a subclass")
        with self.transition:
            if self.outbox is not None:
                raise RuntimeError("A queue is already bound; use unbind() first")
            granted = self.configure(self.open_channel(), binding)
        # Twice the size is what the kernel says of a request granted in full.
        if granted < 2 * binding.sock_len:
            try:
                warnings.warn("Socket rcvbuf limit is now %d, requested %d."
                              % (granted, binding.sock_len), RuntimeWarning, stacklevel=1)
            except BaseException:
                self.unbind()
                raise

    cdef object configure(self, Channel channel, binding):
        """Carry out what bind() was asked for; return the size of the receive buffer."""
        cdef uint32_t request[REQUEST_WORDS]
        cdef uint32_t longest = min(binding.copy_range or LARGEST_RANGE, LARGEST_RANGE)
        cdef int error
        if binding.mode != constants.COPY_PACKET:
            longest = 0
        # What a small compile-time buffer cannot hold the kernel need not copy.
        longest = min(longest, <uint32_t> (COMPILED_BUFFER_SIZE - ATTRIBUTE_ROOM))
        channel.shape(binding.batch, ATTRIBUTE_ROOM + longest)
        # What is left from an earlier binding would pass for packets of this one: in the socket,
        # and in the hands of threads that have yet to hear of its end.
        channel.await_readers()
        channel.discard_pending()
        self.note_refusals(None)
        granted = channel.size_receive_buffer(binding.sock_len)
        channel.stamp_packets(binding.timestamps)
        try:
            error = channel.request(encode_bind(request, binding.queue_num, binding.mode, longest,
                                                binding.max_len))
        except BaseException:
            # Interrupted after the kernel has done it, perhaps.
            channel.transmit(encode_unbind(request, binding.queue_num))
            raise
        if error == UNANSWERED:
            raise bind_unanswered(binding.queue_num)
        if error:
            raise bind_refused(binding.queue_num, error, channel.port_id(), elsewhere=self.adopted)
        self.queue_num = binding.queue_num
        self.callback = binding.callback
        self.bound_by = getpid()
        self.stopping = False
        self.outbox = Outbox(channel.fd, binding.verdict_delay, channel)
        self.take_arrived()
        if self.first is not None:
            # They are no longer in the socket, and event loops watch nothing else.
            channel.wake()
        return granted

    def unbind(self):
        """Send the verdicts that are pending and give the queue up; the kernel drops the packets
        in it. A run() under way returns.

        Does nothing if the queue is not bound. Can be called from any thread, from the callback
        and from signal handlers. Raises OSError if the kernel refuses.
        """
        cdef Outbox outbox
        with self.transition:
            outbox = self.outbox
            if outbox is None:
                return
            self.outbox = None
            try:
                outbox.close()
            finally:
                self.forget_batches()
                self.release_queue()

    cdef int release_queue(self) except -1:
        cdef uint32_t request[REQUEST_WORDS]
        cdef nlmsghdr *message = encode_unbind(request, self.queue_num)
        cdef int error
        if self.channel.readers > 0:
            # The answer wakes the reader: waiting for it here would be waiting for the other.
            self.channel.transmit(message)
            return 0
        error = self.channel.request(message)
        self.channel.discard_pending()
        # ENODEV: the answer to an earlier try was lost; unbound it is in either case.
        if error and error != ENODEV and error != UNANSWERED:
            raise unbind_refused(self.queue_num, error)
        return 0

    def close(self):
        """Unbind, and close the socket. Idempotent. In a forked child it closes the child's
        descriptor and leaves the queue bound, unless the child itself has bound it."""
        cdef Outbox outbox
        with self.transition:
            outbox = self.outbox
            self.is_closed = True
            try:
                if outbox is not None and self.bound_by != getpid():
                    self.outbox = None
                    self.forget_batches()
                    outbox.close()
                self.unbind()
            finally:
                if self.channel is not None:
                    self.channel.await_readers()
                    self.channel.close()

    # Receiving

    def handle(self, packet):
        """Called with each packet if bind() was given no callback; for subclasses to override."""
        raise NotImplementedError("override handle() in a subclass, or pass a callback to bind()")

    def run(self, block=True):
        """Call the callback for each packet: until stop() or unbind(), or, where ``block`` is
        false, until none is pending.

        Also returns when nothing is pending and somebody made the descriptor non-blocking. What
        the callback or a signal handler raises leaves run(): the packet concerned stays undecided
        and usable, the others of its read come with the next run(). Raises RuntimeError if the
        queue is not bound, OSError if reading or sending fails.
        """
        cdef bint wait = bool(block)
        cdef bint handles_signals = wait and threading.current_thread() is threading.main_thread()
        cdef bint more = True
        cdef Slab slab
        cdef Outbox outbox = self.enter()
        callback = self.callback if self.callback is not None else self.handle
        try:
            if handles_signals:
                self.channel.look_back(True)
            while not self.deliver(outbox, callback):
                if not (wait or more):
                    return
                slab = self.channel.receive(0 if wait else MSG_DONTWAIT)
                if slab is None:
                    return
                # A read that did not fill its slab has emptied the socket.
                more = slab.filled == <int> slab.slots
                self.take(slab, outbox)
        finally:
            try:
                self.leave(outbox)
            finally:
                if handles_signals:
                    self.channel.look_back(False)

    def run_socket(self, sock):
        """Like run(), but read through ``sock.recv(n)``: with a socket that gevent has patched,
        or with a timeout. ``sock`` is made from get_fd() by socket.fromfd().

        Returns when ``recv`` says that nothing is pending (EAGAIN); its other errors, time-outs
        among them, leave run_socket().
        """
        cdef Slab slab = Slab(1, 0)
        cdef Outbox outbox = self.enter()
        cdef bytes datagram
        callback = self.callback if self.callback is not None else self.handle
        try:
            while not self.deliver(outbox, callback):
                datagram = self.receive_from(sock)
                if datagram is None:
                    continue
                if not datagram:
                    return
                if slab.users:
                    slab = Slab(1, 0)
                slab.users += 1
                slab.lend(datagram)
                slab.take_stock(self.channel)
                self.take(slab, outbox)
        finally:
            self.leave(outbox)

    cdef bytes receive_from(self, sock):
        """A datagram; empty if nothing is pending, None after an overrun."""
        # While there are packets, recv() neither waits nor looks whether a signal came.
        PyErr_CheckSignals()
        self.channel.begin_foreign()
        try:
            datagram = sock.recv(self.channel.slot_size)
        except OSError as error:
            if isinstance(error, BlockingIOError) or error.errno == EAGAIN:
                return b""
            if error.errno == ENOBUFS:
                return None
            raise
        finally:
            self.channel.end_foreign()
        if PyBytes_CheckExact(datagram):
            return datagram
        return bytes(memoryview(datagram))

    def stop(self):
        """End run() and run_socket() after the packet at hand; what was read with it comes with
        the next run(). If none is under way, the next one returns at once.

        Can be called from any thread, from the callback and from signal handlers.
        """
        self.stopping = True
        if self.channel is not None and self.channel.readers > 0:
            self.channel.wake()

    cdef Outbox enter(self):
        self.require_open()
        if self.outbox is None:
            raise RuntimeError("no queue is bound: call bind() first")
        self.runners += 1
        return self.outbox

    cdef int leave(self, Outbox outbox) except -1:
        self.runners -= 1
        if not self.runners:
            self.stopping = False
        elif self.stopping or outbox.closed:
            # One message wakes one reader: pass it on to the next.
            self.channel.wake()
        if not outbox.closed:
            if self.first is not None:
                # They are no longer in the socket, and event loops watch nothing else.
                self.channel.wake()
            outbox.flush()
        return 0

    cdef bint deliver(self, Outbox outbox, callback) except -1:
        """Call the callback for the packets that have been read and send what is then pending.
        True: it is time to leave."""
        cdef Packet packet
        while not (self.stopping or outbox.closed):
            packet = self.next_packet()
            if packet is not None:
                self.hand_over(packet, callback)
                continue
            outbox.raise_late_error()
            # While it sends, another thread may call stop().
            if not outbox.flush():
                return False
        return True

    cdef Packet next_packet(self):
        """The next of the packets that have been read, or None."""
        cdef Batch batch
        cdef Packet packet = None
        while packet is None and self.first is not None:
            batch = self.first
            packet = batch.next(&self.tally)
            if not batch.remaining and self.first is batch:
                self.drop_first()
        return packet

    cdef int drop_first(self) except -1:
        self.first = self.first.following
        if self.first is None:
            # A batch knows its queue: the queue must not keep one for ever.
            self.last = None
        return 0

    cdef int hand_over(self, Packet packet, callback) except -1:
        try:
            answer = callback(packet)
            # Other values have no meaning: classic callbacks return what they like.
            if answer is not None and isinstance(answer, Verdict):
                self.obey(packet, answer)
        except BaseException:
            packet.keep_payload()
            raise
        return packet.end_borrowing()

    cdef int obey(self, Packet packet, answer) except -1:
        """Give the verdict that the callback returned, if it has not given one itself."""
        cdef uint32_t verdict = answer
        if verdict == STOLEN or verdict == QUEUE:
            raise ValueError(f"the callback returned {answer!r}: return Verdict.DROP, ACCEPT, "
                             "REPEAT or STOP, or None to decide by the packet's methods")
        if not packet.is_decided():
            packet.decide(verdict)
        return 0

    cdef int take(self, Slab slab, Outbox outbox) except -1:
        """Queue what a read has brought for delivery."""
        if outbox.closed:
            # A signal handler has unbound the queue, and perhaps bound it again, before the read.
            outbox = self.outbox
        if outbox is None:
            slab.users -= 1
            return 0
        if slab.messages:
            self.append(new_batch(slab, outbox, self))
            if slab.messages > 1:
                outbox.start_helper()
        else:
            slab.users -= 1
        if self.channel.refusals:
            self.note_refusals(outbox)
        return 0

    cdef int append(self, Batch batch) except -1:
        if self.first is None:
            self.first = batch
        else:
            self.last.following = batch
        self.last = batch
        return 0

    cdef int take_arrived(self) except -1:
        cdef list arrived = self.channel.arrived
        self.channel.arrived = []
        for slab in arrived:
            self.take(slab, self.outbox)
        return 0

    cdef int note_refusals(self, Outbox outbox) except -1:
        """Count what the kernel refused; None: the verdicts were an earlier binding's."""
        cdef uint32_t sequence
        cdef int error
        cdef list refusals = self.channel.refusals
        self.channel.refusals = []
        for sequence, error in refusals:
            if is_verdict(sequence):
                self.verdict_errors += 1
                if outbox is not None:
                    outbox.refused(sequence, error)
            else:
                self.request_errors += 1
        return 0

    cdef int forget_batches(self) except -1:
        while self.first is not None:
            self.first.end()
            self.drop_first()
        return 0

    cdef int begin_in_child(self) except -1:
        # What the parent has read, the parent delivers.
        self.forget_batches()
        self.transition = threading.RLock()
        if self.channel is not None:
            self.channel.forget_threads()
        return 0


# Queues that are open at exit send what is pending; without this, verdicts that wait for the
# helper thread would end with the process.
live_queues = weakref.WeakValueDictionary()


@atexit.register
def close_all():
    with contextlib.ExitStack() as stack:
        for queue in list(live_queues.values()):
            stack.callback(queue.close)


def begin_in_child():
    cdef NetfilterQueue queue
    for queue in list(live_queues.values()):
        queue.begin_in_child()


os.register_at_fork(after_in_child=begin_in_child)

# Users know the class by the package's name, not the extension's.
(<PyTypeObject *> NetfilterQueue).tp_name = b"netfilterqueue.NetfilterQueue"

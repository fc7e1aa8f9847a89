"""``NetfilterQueue``: a queue bound, run and stopped."""
cimport cython
from cpython.object cimport PyTypeObject
from libc.errno cimport ENOBUFS, ENODEV, EOPNOTSUPP
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.types cimport pid_t

from netfilterqueue._channel cimport BUFFER_SIZE as COMPILED_BUFFER_SIZE
from netfilterqueue._channel cimport UNANSWERED, Channel
from netfilterqueue._nfqueue cimport (
    ATTRIBUTE_ROOM, REQUEST_WORDS, encode_bind, encode_flags, encode_max_len, encode_mode,
    encode_unbind, encode_verdict_up_to,
)
from netfilterqueue._outbox cimport NO_DEFAULT, Outbox
from netfilterqueue._packet cimport Packet, is_decided
from netfilterqueue._receiver cimport Limits, Pulling, Receiver, limits_of
from netfilterqueue._signals cimport end_watch
from netfilterqueue._uapi cimport NF_DROP, NF_QUEUE, NF_STOLEN, close, getpid, nlmsghdr

import atexit
import contextlib
import os
import socket
import threading
import time
import warnings
import weakref

from netfilterqueue import aio, constants
from netfilterqueue._advice import (
    bind_refused, bind_unanswered, flags_lacking, refused, unbind_refused,
)
from netfilterqueue._arguments import (
    FLAGS, MAX_INT, MAX_UINT32, check_bind, copy_mode, integer, require_function,
)
from netfilterqueue._netns import open_socket
from netfilterqueue.constants import Verdict
from netfilterqueue.stats import QueueStats, queues_beside

cdef extern from "Python.h":
    object PyObject_CallOneArg(object function, object argument)

BUFFER_SIZE = COMPILED_BUFFER_SIZE

cdef uint8_t COPY_PACKET = constants.COPY_PACKET

# The longest payload that a packet can have.
cdef enum:
    LARGEST_RANGE = 65535


cdef class NetfilterQueue(Receiver):
    """NetfilterQueue(*, af=2, sockfd=-1, netns=None)\n--\n\nA queue of packets that iptables'
    NFQUEUE target (or nftables' queue) hands to this program.

    ``bind`` to a queue number, ``run`` a callback for each packet, ``unbind``. In a subclass,
    overriding ``handle`` does instead of a callback. As a context manager it closes itself.

    ``netns``: serve the queue of another network namespace: that of a process (its pid), of a
    path such as /run/netns/blue, or of a descriptor that is open, also as an object with fileno().
    ``sockfd``: a netlink socket of the netfilter family that somebody else opened, perhaps in
    another network namespace; a duplicate of it is used. ``af`` is there for programs that pass
    it: the kernel has long since ceased to tell queues by address family.

    Raises OSError if no socket can be opened, ValueError if ``sockfd`` is not such a socket or
    ``netns`` no such namespace, or both are given, PermissionError if the namespace is closed to
    this process: to enter takes CAP_SYS_ADMIN.
    """

    COPY_NONE = constants.COPY_NONE
    COPY_META = constants.COPY_META
    COPY_PACKET = constants.COPY_PACKET

    cdef object __weakref__
    cdef object transition      # RLock: bind, unbind and close, one at a time
    cdef int queue_num
    cdef pid_t bound_by         # a forked child must not unbind its parent's queue
    cdef object callback        # None: handle()

    def __cinit__(self, *args, **kwargs):
        # Reentrant, for signal handlers that unbind.
        self.transition = threading.RLock()
        live_queues[id(self)] = self

    def __init__(self, *, af=socket.AF_INET, sockfd=-1, netns=None):
        descriptor = integer("sockfd", sockfd, -1, MAX_INT)
        if netns is not None and descriptor >= 0:
            raise ValueError("sockfd and netns exclude each other: a socket belongs to the network "
                             "namespace that it was opened in")
        if netns is None:
            self.take_channel(descriptor)
            return
        descriptor = open_socket(netns)
        try:
            self.take_channel(descriptor)
        finally:
            close(descriptor)

    @cython.critical_section
    cdef int take_channel(self, int sockfd) except -1:
        if self.channel is not None:
            raise RuntimeError("this queue has a socket already: call __init__ once, and first")
        self.channel = Channel(sockfd)
        return 0

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

    @cython.critical_section
    cdef Channel open_channel(self):
        self.require_open()
        if self.channel is None:
            self.channel = Channel()
        return self.channel

    # Binding

    # inspect reads the defaults from text, and knows no names there: 2 is COPY_PACKET.
    def bind(self, queue_num, user_callback=None, max_len=1024, mode=2, range=65535,
             sock_len=2455552, *, callback=None, fail_open=False, gso=False, conntrack=False,
             uid_gid=False, secctx=False, timestamps=True, batch=32, verdict_delay=0.001,
             default_verdict=None):
        """Bind the queue ``queue_num`` (0 to 65535) and configure it, in one request.

        ``user_callback`` (or ``callback``)
            is called with each Packet. A Verdict that it returns is given to the packet, if it has
            none yet. Without a callback, handle() is called where a subclass overrides it; else
            packets are pulled, by read() or by iteration.
        ``max_len``
            Packets that may wait for a verdict; the kernel drops what comes on top
            (NFQA_CFG_QUEUE_MAXLEN).
        ``mode``, ``range``
            What is copied of each packet: nothing (COPY_NONE: the kernel drops them all), metadata
            (COPY_META), or also up to ``range`` bytes of payload (COPY_PACKET), 0 for all
            (NFQA_CFG_PARAMS).
        ``sock_len``
            Bytes of the socket's receive buffer; a RuntimeWarning says when there are fewer.
        ``fail_open``, ``gso``, ``conntrack``, ``uid_gid``, ``secctx``
            As set_flags() has them (NFQA_CFG_FLAGS).
        ``timestamps``
            Have the kernel stamp packets on the PREROUTING, INPUT and FORWARD hooks.
        ``batch``, ``verdict_delay``
            Packets taken by one read at the most (1 to 1024), and seconds for which a verdict may
            wait for those of the other packets of its read. With 1, or 0, each is sent at once.
        ``default_verdict``
            The Verdict (DROP, ACCEPT, REPEAT or STOP) of packets that are garbage-collected
            undecided, with the changes made to them. None: they stay in the kernel's queue, and a
            ResourceWarning says so.

        Raises ValueError or TypeError for a wrong argument, RuntimeError if this object is bound
        already, OSError if the number is taken or the kernel lacks a flag, and PermissionError
        without CAP_NET_ADMIN. After an error the queue is not bound.
        """
        flags = {"fail_open": fail_open, "gso": gso, "conntrack": conntrack, "uid_gid": uid_gid,
                 "secctx": secctx}
        binding = check_bind(queue_num, user_callback, max_len, mode, range, sock_len, callback,
                             flags, timestamps, batch, verdict_delay, default_verdict)
        if binding.callback is None and self.overrides_handle():
            require_function("handle()", self.handle, "the packet")
        with self.transition:
            with cython.critical_section(self):
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
        cdef uint32_t flags = bits_of(binding.flags)
        cdef int error
        if self.outbox is not None:
            raise RuntimeError("A queue is already bound; use unbind() first")
        # However little is asked for now: pages that no datagram reaches take no memory, and the
        # queue can be told to copy more while a thread waits with a slab in its hands.
        channel.shape(binding.batch, COMPILED_BUFFER_SIZE)
        # What is left from an earlier binding would pass for packets of this one: in the socket,
        # and in the hands of threads that have yet to hear of its end.
        channel.await_readers()
        channel.discard_pending()
        self.note_refusals(None)
        granted = channel.size_receive_buffer(binding.sock_len)
        channel.stamp_packets(binding.timestamps)
        try:
            error = channel.request(encode_bind(
                request, binding.queue_num, binding.mode,
                bytes_to_copy(binding.mode, binding.copy_range), binding.max_len, flags))
        except BaseException:
            # Interrupted after the kernel has done it, perhaps.
            channel.transmit(encode_unbind(request, binding.queue_num))
            raise
        if error == UNANSWERED:
            channel.transmit(encode_unbind(request, binding.queue_num))
            raise bind_unanswered(binding.queue_num)
        if error == EOPNOTSUPP and flags:
            raise flags_lacking(f"create queue {binding.queue_num}",
                                self.which_lack(binding.queue_num, binding.flags))
        if error:
            raise bind_refused(binding.queue_num, error, channel.port_id(), channel.fd)
        self.queue_num = binding.queue_num
        self.callback = binding.callback
        self.bound_by = getpid()
        self.heard = self.stops
        self.max_len = binding.max_len
        self.outbox = Outbox(channel.fd, binding.verdict_delay, channel, NO_DEFAULT
                             if binding.default_verdict is None else binding.default_verdict)
        self.take_arrived()
        if self.first is not None or self.awaiting:
            # Packets are no longer in the socket, and event loops watch nothing else; nor is the
            # word that an earlier binding has ended.
            channel.nudge()
        return granted

    cdef list which_lack(self, uint32_t queue_num, names):
        """Which of these flags it is that this kernel does not have. It looks at flags before all
        else: so each is put into a request that fails in either case."""
        cdef uint32_t request[REQUEST_WORDS]
        cdef list lacking = []
        # It may be: bind() can be asked for what another object has bound with the same socket.
        cdef bint bound = not self.ask(encode_flags(request, queue_num, 0, 0))
        for name in names:
            if bound:
                encode_bind(request, queue_num, COPY_PACKET, 0, 1, FLAGS[name])
            else:
                encode_flags(request, queue_num, FLAGS[name], FLAGS[name])
            if self.ask(<nlmsghdr *> request) == EOPNOTSUPP:
                lacking.append(name)
        return lacking or list(names)

    # Changes while it is bound

    def set_mode(self, mode, range):
        """Change what is copied of the packets that come from now on: COPY_NONE, COPY_META, or
        COPY_PACKET with up to ``range`` bytes of payload, 0 for all (NFQA_CFG_PARAMS).

        Like set_max_len() and set_flags(): ValueError or TypeError for a wrong argument, before
        anything is sent; RuntimeError if the queue is not bound; OSError if the kernel refuses.
        """
        cdef uint32_t request[REQUEST_WORDS]
        cdef uint8_t copied = copy_mode(mode)
        cdef uint32_t length = bytes_to_copy(copied, integer("range", range, 0, MAX_UINT32))
        with self.transition:
            with cython.critical_section(self):
                self.require_bound()
                error = self.ask(encode_mode(request, self.queue_num, copied, length))
            if error:
                raise refused(f"set the copy mode of queue {self.queue_num}", error)

    def set_max_len(self, max_len):
        """Change how many packets may wait for a verdict, 1 or more (NFQA_CFG_QUEUE_MAXLEN). Those
        that wait already stay. Raises as set_mode() does."""
        cdef uint32_t request[REQUEST_WORDS]
        cdef uint32_t length = integer("max_len", max_len, 1, MAX_UINT32)
        with self.transition:
            with cython.critical_section(self):
                self.require_bound()
                # Before it is done: the kernel's answer can be lost.
                self.max_len = max(self.max_len, length)
                error = self.ask(encode_max_len(request, self.queue_num, length))
            if error:
                raise refused(f"set the maximum length of queue {self.queue_num}", error)

    def set_flags(self, *, fail_open=None, gso=None, conntrack=None, uid_gid=None, secctx=None):
        """Set flags of a bound queue (True), clear them (False), or leave them as they are (None):
        all of them in one request (NFQA_CFG_FLAGS).

        ``fail_open``
            The kernel accepts what comes while the queue, or the receive buffer, is full.
        ``gso``
            Packets that the kernel has joined come as they are, of up to 64 KiB and with an
            unfinished checksum, instead of being cut into segments first.
        ``conntrack``
            Packets come with their connection.
        ``uid_gid``
            Packets of local senders come with ``uid`` and ``gid``.
        ``secctx``
            Packets of local senders come with the security context that a rule has given them.

        Raises as set_mode() does; the OSError for a flag that the kernel lacks has errno EOPNOTSUPP
        and names it, and then none of the flags was changed.
        """
        cdef uint32_t request[REQUEST_WORDS]
        flags = {"fail_open": fail_open, "gso": gso, "conntrack": conntrack, "uid_gid": uid_gid,
                 "secctx": secctx}
        mask = [name for name, on in flags.items() if on is not None]
        wanted = [name for name in mask if flags[name]]
        lacking = []
        with self.transition:
            with cython.critical_section(self):
                self.require_bound()
                error = self.ask(encode_flags(request, self.queue_num, bits_of(mask),
                                              bits_of(wanted)))
                if error == EOPNOTSUPP:
                    lacking = self.which_lack(self.queue_num, wanted)
            action = f"set flags of queue {self.queue_num}"
            if error == EOPNOTSUPP:
                raise flags_lacking(action, lacking)
            if error:
                raise refused(action, error)

    cdef int ask(self, nlmsghdr *message) except -1:
        """Send a request while packets may come; the kernel's errno, ENOBUFS where its answer was
        lost, 0 for success."""
        cdef int error
        try:
            error = self.channel.request(message)
        finally:
            self.take_arrived()
            if self.first is not None:
                # They are no longer in the socket, and readers and event loops watch nothing else.
                self.channel.nudge()
        return ENOBUFS if error == UNANSWERED else error

    def unbind(self):
        """Send the verdicts that are pending and give the queue up; the kernel drops the packets
        in it. A run() under way returns.

        Does nothing if the queue is not bound. Can be called from any thread, from the callback
        and from signal handlers. Raises OSError if the kernel refuses.
        """
        with self.transition:
            with cython.critical_section(self):
                if self.outbox is None:
                    return
                try:
                    self.end_binding()
                finally:
                    self.forget_batches()
                    self.release_queue()

    cdef int release_queue(self) except -1:
        cdef uint32_t request[REQUEST_WORDS]
        cdef nlmsghdr *message = encode_unbind(request, self.queue_num)
        cdef int error
        if self.channel.readers > 0 or self.awaiting:
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
        with self.transition:
            try:
                self.begin_to_close()
                self.unbind()
            finally:
                with cython.critical_section(self):
                    if self.channel is not None:
                        self.channel.await_readers()
                        self.channel.close()

    @cython.critical_section
    cdef int begin_to_close(self) except -1:
        self.is_closed = True
        self.callback = None
        if self.outbox is not None and self.bound_by != getpid():
            self.forget_batches()
            self.end_binding()
        return 0

    # Receiving

    def handle(self, packet):
        """Called with each packet if bind() was given no callback; for subclasses to override."""
        raise NotImplementedError("override handle() in a subclass, or pass a callback to bind()")

    def run(self, block=True, *, timeout=None, count=None):
        """Call the callback for each packet: until stop() or unbind(), for ``timeout`` seconds, for
        ``count`` packets, or, where ``block`` is false, until none is pending: then, at the latest,
        after ``max_len`` packets and the rest of that read, as more cannot have been pending.

        Also returns when nothing is pending and somebody made the descriptor non-blocking. What
        the callback or a signal handler raises leaves run(): the packet concerned stays undecided
        and usable, the others of its read come with the next run(). Raises RuntimeError if the
        queue is not bound or has no callback, OSError if reading or sending fails.
        """
        cdef Limits limits = limits_of(block, timeout, count)
        cdef Outbox outbox = self.enter(&limits)
        try:
            self.deliver(self.require_callback(), None, outbox, &limits)
        finally:
            self.leave(outbox, &limits, None)

    def run_socket(self, sock):
        """Like run(), but read through ``sock.recv(n)``: with a socket that gevent has patched,
        or with a timeout. ``sock`` is made from get_fd() by socket.fromfd().

        Returns when ``recv`` says that nothing is pending (EAGAIN); its other errors, time-outs
        among them, leave run_socket(). Raises TypeError if ``sock`` has no ``recv``.
        """
        cdef Limits limits = limits_of(False, None, None)
        cdef Outbox outbox = self.enter(&limits)
        try:
            callback = self.require_callback()
            if not hasattr(sock, "recv"):
                raise TypeError("run_socket() reads through a socket, or another object with "
                                f"recv(n); got {sock!r}")
            self.deliver(callback, sock, outbox, &limits)
        finally:
            self.leave(outbox, &limits, None)

    # The callback runs outside of the critical section: it can take its time, wait for threads that
    # decide packets, or be one of several greenlets.

    cdef int deliver(self, callback, sock, Outbox outbox, Limits *limits) except -1:
        """Call the callback with one packet after the other, until there will be none."""
        cdef Packet packet = None
        try:
            while not used_up(limits):
                if sock is None:
                    packet = self.await_packet(outbox, limits, False)
                else:
                    packet = self.await_through(sock, outbox, limits)
                if packet is None:
                    break
                limits.wanted -= 1
                answer = PyObject_CallOneArg(callback, packet)
                # Other values have no meaning: classic callbacks return what they like.
                if answer is not None and isinstance(answer, Verdict):
                    self.obey(packet, answer)
                self.take_back(packet)
                # One that nobody has kept ends now, not when the next one has come.
                packet = answer = None
        except BaseException:
            if packet is not None:
                packet.keep_payload()
            raise
        return 0

    @cython.critical_section
    cdef int obey(self, Packet packet, answer) except -1:
        """Give the verdict that the callback returned, if it has not given one itself."""
        cdef uint32_t verdict = answer
        if verdict == NF_STOLEN or verdict == NF_QUEUE:
            raise ValueError(f"the callback returned {answer!r}: return Verdict.DROP, ACCEPT, "
                             "REPEAT or STOP, or None to decide by the packet's methods")
        if not is_decided(packet):
            packet.decide(verdict)
        return 0

    # Pulling

    def read(self, count=None, timeout=None):
        """Wait for packets and return a list of them: what one read brings, ``count`` at the most.

        Their payloads stay available for as long as they live. The list is empty after ``timeout``
        seconds (0: at once) without a packet, and after stop() or unbind(). Raises RuntimeError if
        the queue is not bound, or was bound with a callback.
        """
        cdef Limits limits = limits_of(True, timeout, count)
        cdef Outbox outbox = self.enter(&limits)
        cdef list packets = []
        cdef Packet packet
        try:
            with cython.critical_section(self):
                self.require_no_callback()
                packet = self.await_packet(outbox, &limits, True)
                while packet is not None:
                    packets.append(packet)
                    limits.wanted -= 1
                    packet = self.pull() if limits.wanted else None
        finally:
            self.leave_with(packets, outbox, &limits)
        return packets

    def __iter__(self):
        """Pull one packet after the other, until stop() or unbind(). Raises as read() does."""
        cdef Limits limits = limits_of(True, None, None)
        cdef Outbox outbox = self.enter(&limits)
        cdef Packet packet
        try:
            self.require_no_callback()
            while (packet := self.await_packet(outbox, &limits, True)) is not None:
                # Nobody knows which thread comes back, nor when.
                end_watch(&limits.watch)
                yield packet
        finally:
            self.leave(outbox, &limits, None)

    def aread(self, count=None, timeout=None):
        """read() for coroutines, on asyncio and on trio. Cancelled, it loses no packet."""
        limits_of(True, timeout, count)
        return aio.read(self.pulling(), count, timeout)

    def __aiter__(self):
        """Pull one packet after the other, on asyncio and on trio, until stop() or unbind()."""
        return aio.Packets(self.pulling())

    @cython.critical_section
    cdef Pulling pulling(self):
        self.require_bound()
        self.require_no_callback()
        return Pulling(self)

    # Stopping

    @cython.critical_section
    def stop(self):
        """End the loops under way, of whatever kind, after the packet at hand; what was read with
        it comes with the next. If none ends by it, as none is under way, the next one does.

        Can be called from any thread, from the callback and from signal handlers.
        """
        self.stops += 1
        if self.channel is not None and (self.channel.readers > 0 or self.awaiting):
            self.channel.wake()

    # Statistics

    @cython.critical_section
    def stats(self):
        """What was counted since this object was made, as ``netfilterqueue.stats.QueueStats``."""
        cdef uint64_t malformed = self.tally.skipped.malformed
        cdef uint64_t overruns = 0
        if self.channel is not None:
            malformed += self.channel.malformed
            overruns = self.channel.lost_to_overruns()
        return QueueStats(
            packets=self.tally.packets,
            bytes=self.tally.bytes,
            batches=self.tally.batches,
            truncated=self.tally.truncated,
            # One cannot be given.
            verdicts={verdict: self.verdicts_given(verdict) for verdict in Verdict
                      if verdict != NF_STOLEN},
            abandoned=self.packets_abandoned(),
            verdict_errors=dict(self.verdict_errors),
            request_errors=self.request_errors,
            overruns=overruns,
            malformed=malformed,
            foreign=self.tally.skipped.foreign,
            broken_attributes=self.tally.skipped.broken_attributes,
            unread_attributes=self.tally.skipped.unread_attributes,
            kernel=self.kernel_queue(),
        )

    cdef object kernel_queue(self):
        """The kernel's row of the queue; None where it is not bound, or that cannot be read."""
        if self.outbox is None:
            return None
        try:
            return queues_beside(self.channel.fd).get(self.queue_num)
        except OSError:
            return None

    # What all of these share

    cdef object require_callback(self):
        """The callback of run(), or handle() of a subclass; RuntimeError where there is neither."""
        with cython.critical_section(self):
            if self.callback is not None:
                return self.callback
        if not self.has_callback():
            raise RuntimeError("the queue was bound without a callback: pass one to bind(), "
                               "override handle(), or pull packets by read() or iteration")
        return self.handle

    cdef int require_no_callback(self) except -1:
        if self.has_callback():
            raise RuntimeError("the queue has a callback: use run(), or bind without a callback to "
                               "pull packets")
        return 0

    cdef bint has_callback(self) except -1:
        return self.callback is not None or self.overrides_handle()

    cdef bint overrides_handle(self) except -1:
        return type(self).handle is not NetfilterQueue.handle

    cdef int begin_in_child(self) except -1:
        # What the parent has read, the parent delivers.
        self.forget_batches()
        self.awaiting.clear()
        self.runners = [thread for thread in self.runners if thread == threading.get_ident()]
        self.transition = threading.RLock()
        if self.channel is not None:
            self.channel.forget_threads()
        return 0


cdef inline bint used_up(const Limits *limits) except -1:
    return not limits.wanted or (limits.timed and limits.waits
                                 and time.monotonic() >= limits.deadline)


cdef uint32_t bits_of(names) except? 0:
    return sum(FLAGS[name] for name in names)


cdef uint32_t bytes_to_copy(uint8_t mode, uint32_t copy_range) noexcept:
    """The range to tell the kernel: what a slot cannot hold it need not copy."""
    cdef uint32_t longest = min(LARGEST_RANGE, COMPILED_BUFFER_SIZE - ATTRIBUTE_ROOM)
    if mode != COPY_PACKET:
        return 0
    return min(copy_range, longest) if copy_range else longest


def drop_older(NetfilterQueue queue not None, Packet packet not None):
    """Drop the packets of a queue that came before this one and have no verdict yet: for a process
    that follows another on the same socket, and whose packets only that one knew."""
    cdef uint32_t request[REQUEST_WORDS]
    if packet.fields.id > 1:
        queue.channel.transmit(encode_verdict_up_to(request, packet.fields.queue_num,
                                                    packet.fields.id - 1, NF_DROP))


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

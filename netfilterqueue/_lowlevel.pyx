"""NFQUEUE for programs that own the socket and the loop: datagrams in, verdicts out."""
cimport cython
from cpython.bytes cimport PyBytes_CheckExact
from cpython.long cimport PyLong_CheckExact
from cpython.object cimport PyTypeObject
from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EBUSY, ENOBUFS, ENODEV
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from posix.types cimport pid_t

from netfilterqueue._channel cimport BUFFER_SIZE, UNANSWERED, Channel
from netfilterqueue._nfqueue cimport (
    MAX_PAYLOAD, REQUEST_WORDS, encode_bind, encode_family, encode_flags, encode_max_len,
    encode_mode, encode_unbind,
)
from netfilterqueue._outbox cimport Outbox
from netfilterqueue._packet cimport Packet
from netfilterqueue._receiver cimport Receiver, next_packet, take
from netfilterqueue._uapi cimport (
    NFQNL_CFG_CMD_PF_BIND, NFQNL_CFG_CMD_PF_UNBIND, NF_QUEUE, NF_STOLEN, NF_STOP,
    NF_VERDICT_FLAG_QUEUE_BYPASS, getpid, nlmsghdr,
)

import contextlib
import os
import threading
import weakref

from netfilterqueue import constants
from netfilterqueue._advice import bind_refused, bind_unanswered, refused, unbind_refused
from netfilterqueue._arguments import FLAGS, MAX_UINT32, copy_mode, integer, require_function

cdef uint8_t COPY_PACKET = constants.COPY_PACKET

cdef enum:
    # The kernel's own length of a queue.
    MAX_LEN = 1024
    # The channel reads only when the kernel's answer to a request is awaited.
    SLOTS = 8


@cython.final
cdef class Registration:
    """A queue of a handle. Apart from the object that the user holds, which keeps the handle alive:
    two that hold each other would keep the socket until the garbage collector comes."""
    cdef uint16_t number
    cdef object callback
    cdef pid_t bound_by         # a forked child must not unbind its parent's queue; 0: no kernel's
    cdef bint destroyed


def open():
    """Open a netlink socket and return the NetfilterQueueHandle that decodes what comes from it.

    Raises OSError if the socket cannot be opened.
    """
    cdef NetfilterQueueHandle handle
    cdef Channel channel = Channel()
    # A packet comes alone, so its verdict has none to wait for.
    cdef Outbox outbox = Outbox(channel.fd, 0, channel)
    channel.shape(SLOTS, BUFFER_SIZE)
    channel.stamp_packets(True)
    handle = NetfilterQueueHandle.__new__(NetfilterQueueHandle)
    handle.channel = channel
    handle.outbox = outbox
    live_handles.add(handle)
    return handle


@cython.final
cdef class NetfilterQueueHandle(Receiver):
    """A netlink socket that the program reads itself, and the queues that are bound to it.

    Made by open(). The program calls recv() on a socket made from fd(), in whatever loop it likes,
    and passes each datagram to handle_packet(). All methods but close() raise ValueError once the
    handle is closed. Any thread may call them.

    Packets come in the order of the queue. Where one thread changes something, such as a queue's
    mode, while another has received a datagram that it has not passed on yet, those that the change
    found in the socket can come before that one.
    """
    cdef object __weakref__
    cdef dict queues            # by number; the value is a Registration
    cdef list delivering        # NetfilterQueueData whose callbacks run
    cdef unsigned long reader   # the thread that was last taken to wait in recv(); 0: none
    cdef list kept              # packets that wait for the next handle_packet(), before `first`

    def __cinit__(self):
        self.queues = {}
        self.delivering = []
        self.kept = []

    def __init__(self, *args, **kwargs):
        raise TypeError("handles are made by open()")

    def __del__(self):
        self.close()

    cdef int require_open(self) except -1:
        if self.is_closed or self.channel is None:
            raise ValueError("this handle is closed: open() makes another")
        return 0

    # Configuration

    def bind_pf(self, family):
        """Bind the address family ``family``, such as socket.AF_INET. Only kernels before 3.8 need
        it; later ones check the capability, and no more. Raises OSError if the kernel refuses."""
        self.change_family("bind", family, NFQNL_CFG_CMD_PF_BIND)

    def unbind_pf(self, family):
        """Unbind an address family, with as little effect as bind_pf()."""
        self.change_family("unbind", family, NFQNL_CFG_CMD_PF_UNBIND)

    cdef int change_family(self, str verb, family, uint8_t command) except -1:
        cdef uint32_t request[REQUEST_WORDS]
        cdef uint16_t number = integer("family", family, 0, 0xFFFF)
        cdef int error = self.ask(encode_family(request, number, command))
        if error:
            raise refused(f"{verb} address family {number}", error)
        return 0

    @cython.critical_section
    def create_queue(self, number, callback):
        """Bind the queue ``number`` (0 to 65535) and return its NetfilterQueueQueueHandle.

        handle_packet() calls ``callback`` with a NetfilterQueueData for each packet of that queue.
        Packets come whole from the start; set_mode() changes that. Raises OSError if the number is
        taken, PermissionError without CAP_NET_ADMIN.
        """
        cdef uint32_t request[REQUEST_WORDS]
        cdef Registration queue = Registration.__new__(Registration)
        cdef int error
        self.require_open()
        queue.number = integer("number", number, 0, 0xFFFF)
        require_function("the callback", callback, "the packet's data")
        queue.callback = callback
        queue.bound_by = getpid()
        if queue.number in self.queues:
            raise bind_refused(queue.number, EBUSY, self.channel.port_id(), self.channel.fd)
        # First of all: another thread may receive its packets before this one has the answer.
        self.queues[queue.number] = queue
        try:
            error = self.ask(encode_bind(request, queue.number, COPY_PACKET, MAX_PAYLOAD, MAX_LEN,
                                         0))
            if error == ENOBUFS:
                raise bind_unanswered(queue.number)
            if error:
                raise bind_refused(queue.number, error, self.channel.port_id(), self.channel.fd)
        except BaseException as failure:
            del self.queues[queue.number]
            if not isinstance(failure, OSError):
                # Interrupted after the kernel has done it, perhaps.
                self.channel.transmit(encode_unbind(request, queue.number))
            raise
        return new_queue_handle(self, queue)

    @cython.critical_section
    cdef int ask(self, nlmsghdr *message) except -1:
        """Send a request and return the kernel's errno, ENOBUFS where its answer was lost."""
        cdef int error
        self.require_open()
        error = self.channel.request(message)
        self.take_arrived()
        self.call_back()
        return ENOBUFS if error == UNANSWERED else error

    cdef int call_back(self) except -1:
        """Have the program come to handle_packet() if there are packets for it."""
        if self.first is not None or self.kept:
            # They are no longer in the socket, and the program watches nothing else.
            self.channel.nudge()
        return 0

    @cython.critical_section
    cdef int destroy(self, Registration queue) except -1:
        cdef uint32_t request[REQUEST_WORDS]
        cdef NetfilterQueueData data
        cdef int error
        if queue.destroyed:
            return 0
        try:
            for data in list(self.delivering):
                if data.queue is queue:
                    data.execute()
        finally:
            queue.destroyed = True
            self.queues.pop(queue.number, None)
            # A forked child has no say about its parent's queue, but its own end of it is over.
            error = 0
            if queue.bound_by == getpid():
                error = self.ask(encode_unbind(request, queue.number))
            self.forget_packets_of(queue.number)
        # ENODEV: the answer to an earlier try was lost; unbound it is in either case.
        if error and error != ENODEV and error != ENOBUFS:
            raise unbind_refused(queue.number, error)
        return 0

    cdef int forget_packets_of(self, uint16_t number) except -1:
        """They would pass for packets of the next queue of that number, which has the same ids."""
        cdef list others = []
        cdef Packet packet
        while (packet := self.next_kept()) is not None:
            if packet.fields.queue_num != number:
                packet.keep_payload()
                others.append(packet)
        self.kept = others
        return 0

    # Packets

    def handle_packet(self, data):
        """Decode a datagram, any bytes-like object, and call the callbacks of its packets.

        What a callback raises leaves handle_packet(). A verdict that it has set is executed all the
        same; without one the packet stays undecided, and can be handled again. Raises OSError if a
        verdict cannot be sent, and TypeError for what is not bytes-like. What is no packet, or no
        packet of a queue of this handle, is skipped.
        """
        cdef bytes datagram = data if PyBytes_CheckExact(data) else bytes(memoryview(data))
        cdef NetfilterQueueData delivered
        with cython.critical_section(self):
            self.require_open()
            if self.channel.waiters:
                self.return_from_recv()
        try:
            with cython.critical_section(self):
                take(self, self.borrow(datagram), self.outbox)
                self.outbox.raise_late_error()
            while (delivered := self.next_to_deliver()) is not None:
                self.deliver(delivered)
        finally:
            with cython.critical_section(self):
                if not self.is_closed:
                    self.call_back()
                    if self.reader != <unsigned long> PyThread_get_thread_ident():
                        self.go_to_recv()

    # A thread that has called handle_packet() is taken to wait in recv(): it can have received the
    # kernel's answer to a request of another thread, which waits until it has handled that.

    cdef int go_to_recv(self) except -1:
        if threading.get_ident() not in self.channel.foreign:
            self.channel.begin_foreign()
        self.reader = PyThread_get_thread_ident()
        return 0

    cdef int return_from_recv(self) except -1:
        if threading.get_ident() in self.channel.foreign:
            self.channel.end_foreign()
        self.reader = 0
        return 0

    cdef Packet next_kept(self):
        """The next of the packets that came, in their order, or None."""
        return self.kept.pop(0) if self.kept else next_packet(self)

    @cython.critical_section
    cdef NetfilterQueueData next_to_deliver(self):
        """The next packet that came and has a queue here, or None."""
        cdef Packet packet
        cdef Registration queue
        cdef NetfilterQueueData data
        while (packet := self.next_kept()) is not None:
            queue = self.queues.get(packet.fields.queue_num)
            if queue is not None:
                data = NetfilterQueueData.__new__(NetfilterQueueData)
                data.packet = packet
                data.queue = queue
                self.delivering.append(data)
                return data
            self.tally.skipped.foreign += 1
        return None

    cdef int deliver(self, NetfilterQueueData data) except -1:
        try:
            # Outside of the critical section, as a callback may take its time.
            data.queue.callback(data)
        finally:
            with cython.critical_section(self):
                self.end_delivery(data)
        return 0

    cdef int end_delivery(self, NetfilterQueueData data) except -1:
        cdef Packet packet = data.packet
        self.delivering.remove(data)
        try:
            data.execute()
        finally:
            data.end()
            packet.end_borrowing()
        return 0

    # The socket

    @cython.critical_section
    def fd(self):
        """The descriptor of the socket, for socket.fromfd(), event loops and the like."""
        self.require_open()
        return self.channel.fd

    def close(self):
        """Destroy the queues and close the socket. Idempotent. In a forked child it closes the
        child's descriptor and leaves the parent's queues bound."""
        with cython.critical_section(self):
            if not self.is_closed:
                self.shut()

    cdef int shut(self) except -1:
        try:
            with contextlib.ExitStack() as stack:
                for queue in list(self.queues.values()):
                    stack.callback(new_queue_handle(self, queue).destroy)
        finally:
            self.is_closed = True
            self.forget_packets()
            if self.channel is not None:
                self.outbox.close()
                self.channel.close()
        return 0

    cdef int begin_in_child(self) except -1:
        # What the parent has received, the parent delivers.
        self.forget_packets()
        self.channel.forget_threads()
        self.reader = 0
        return 0

    cdef int forget_packets(self) except -1:
        self.kept.clear()
        return self.forget_batches()


cdef NetfilterQueueQueueHandle new_queue_handle(NetfilterQueueHandle handle, Registration queue):
    cdef NetfilterQueueQueueHandle made
    made = NetfilterQueueQueueHandle.__new__(NetfilterQueueQueueHandle)
    made.handle = handle
    made.queue = queue
    return made


@cython.final
cdef class NetfilterQueueQueueHandle:
    """A queue that is bound to a handle; made by NetfilterQueueHandle.create_queue().

    All methods but destroy() raise ValueError once the queue is destroyed or its handle closed,
    OSError if the kernel refuses, and ValueError or TypeError for a wrong argument, before anything
    is sent.
    """
    cdef NetfilterQueueHandle handle
    cdef Registration queue

    def __init__(self, *args, **kwargs):
        raise TypeError("queues are made by a handle's create_queue()")

    def set_mode(self, mode, range):
        """Say how much of each packet is copied: NFQNL_COPY_NONE (nothing, and the kernel drops
        all packets), NFQNL_COPY_META (all but the payload), or NFQNL_COPY_PACKET, with at most
        ``range`` bytes of payload, 0 for all."""
        cdef uint32_t request[REQUEST_WORDS]
        cdef uint8_t copied = copy_mode(mode)
        cdef uint32_t length = integer("range", range, 0, MAX_UINT32)
        self.change("the copy mode", encode_mode(request, self.number(), copied, length))

    def set_flags(self, mask, flags):
        """Set the flags that are in ``mask``, a sum of NFQA_CFG_F_ constants, as they are in
        ``flags``: flags that are in both are switched on, those in ``mask`` alone are switched off.

        The OSError has errno EOPNOTSUPP where the kernel lacks one of them.
        """
        cdef uint32_t request[REQUEST_WORDS]
        cdef uint32_t which = integer("mask", mask, 0, MAX_UINT32)
        cdef uint32_t bits = integer("flags", flags, 0, MAX_UINT32)
        self.change(f"the flags {names_of(which)}",
                    encode_flags(request, self.number(), which, bits))

    def set_maxlen(self, queuelen):
        """Say how many packets may wait for a verdict, 1 or more, 1024 if this is never called; the
        kernel drops what comes on top."""
        cdef uint32_t request[REQUEST_WORDS]
        cdef uint32_t length = integer("queuelen", queuelen, 1, MAX_UINT32)
        self.change("the maximum length", encode_max_len(request, self.number(), length))

    cdef int change(self, str what, nlmsghdr *message) except -1:
        cdef int error = self.handle.ask(message)
        if error:
            raise refused(f"set {what} of queue {self.queue.number}", error)
        return 0

    cdef uint16_t number(self) except? 0:
        """The queue's number, while it is bound."""
        if self.handle is None:
            raise ValueError("this queue is no handle's: create_queue() makes one")
        self.handle.require_open()
        if self.queue.destroyed:
            raise ValueError(f"queue {self.queue.number} is destroyed: "
                             "create_queue() makes another")
        return self.queue.number

    def destroy(self):
        """Unbind the queue; the kernel drops the packets in it. Idempotent. Verdicts that running
        callbacks have set are executed first. Raises OSError if the kernel refuses."""
        if self.handle is not None:
            self.handle.destroy(self.queue)


@cython.final
@cython.freelist(8)
cdef class NetfilterQueueData:
    """A packet, for as long as its callback runs: afterwards all methods raise RuntimeError."""
    # Guarded by its own critical section, in which nothing else is entered.
    cdef Packet packet          # None once the callback has returned
    cdef Registration queue
    cdef uint32_t verdict       # to be executed
    cdef bint has_verdict

    def __init__(self, *args, **kwargs):
        raise TypeError("packet data comes from a handle's handle_packet()")

    @cython.critical_section
    cdef Packet current(self):
        if self.packet is None:
            raise RuntimeError("this packet's callback has returned: take what is needed later, "
                               "such as get_payload(), and set the verdict in the callback")
        return self.packet

    def get_packet_hw(self):
        """The source's hardware address as bytes, six on Ethernet; empty where there is none, as on
        the OUTPUT hook (NFQA_HWADDR)."""
        return self.current().get_hw() or b""

    def get_nfmark(self):
        """The mark that the packet came with, 0 where it has none (NFQA_MARK)."""
        return self.current().fields.mark

    def get_timestamp(self):
        """When the kernel received it: seconds since the epoch, and microseconds. (0, 0) where
        there is no time stamp, as on OUTPUT and POSTROUTING (NFQA_TIMESTAMP)."""
        cdef Packet packet = self.current()
        return packet.fields.seconds, packet.fields.microseconds

    def get_indev(self):
        """The input interface's index, 0 where there is none (NFQA_IFINDEX_INDEV)."""
        return self.current().fields.indev

    def get_physindev(self):
        """The input port's index of a bridged packet, else 0 (NFQA_IFINDEX_PHYSINDEV)."""
        return self.current().fields.physindev

    def get_outdev(self):
        """The output interface's index, 0 where there is none (NFQA_IFINDEX_OUTDEV)."""
        return self.current().fields.outdev

    def get_physoutdev(self):
        """The output port's index of a bridged packet, else 0 (NFQA_IFINDEX_PHYSOUTDEV)."""
        return self.current().fields.physoutdev

    def get_payload(self):
        """The payload as bytes, from the network header on (NFQA_PAYLOAD). Raises RuntimeError
        where there is none, as with NFQNL_COPY_META."""
        return self.current().get_payload()

    def get_uid(self):
        """The number of the user whose socket sent it; None where the kernel does not say: it does
        for local senders and with the flag NFQA_CFG_F_UID_GID (NFQA_UID)."""
        return self.current().uid

    def get_gid(self):
        """The number of that user's group, None where the kernel does not say (NFQA_GID)."""
        return self.current().gid

    def set_verdict(self, verdict, mark=None):
        """Decide the packet: NF_DROP, NF_ACCEPT, NF_QUEUE, NF_REPEAT or NF_STOP. The verdict is
        executed once the callback exits; until then another call replaces it.

        ``mark``
            The packet's new mark, 0 to 4294967295; None: it keeps its own.

        NF_QUEUE takes the number of the other queue in its upper 16 bits, and 0x8000 for "accept if
        nobody listens there": ``NF_QUEUE | number << 16 | 0x8000``. Raises ValueError for any other
        number, NF_STOLEN among them, which is the kernel's own; OverflowError or TypeError for a
        wrong mark; RuntimeError if the queue has been destroyed.
        """
        cdef Packet packet = self.current()
        cdef uint32_t number = checked_verdict(verdict)
        if self.queue.destroyed:
            raise RuntimeError("Parent queue has already been unbound")
        if mark is not None:
            packet.set_mark(mark)
        else:
            with cython.critical_section(packet.owner):
                packet.has_new_mark = False
        with cython.critical_section(self):
            self.verdict = number
            self.has_verdict = True

    cdef int execute(self) except -1:
        """Send the verdict that was set, once."""
        cdef Packet packet
        cdef uint32_t verdict
        with cython.critical_section(self):
            packet = self.packet if self.has_verdict else None
            verdict = self.verdict
            self.has_verdict = False
        if packet is not None:
            packet.decide(verdict)
        return 0

    @cython.critical_section
    cdef int end(self) except -1:
        self.packet = None
        return 0


cdef uint32_t checked_verdict(verdict) except? 0xFFFFFFFF:
    cdef uint32_t number, kind
    # Without a call of Python code for what nearly all packets get.
    if PyLong_CheckExact(verdict) and 0 <= verdict <= MAX_UINT32:
        number = verdict
    else:
        number = integer("verdict", verdict, 0, MAX_UINT32)
    kind = number & 0xFFFF & ~<uint32_t> NF_VERDICT_FLAG_QUEUE_BYPASS
    if number == NF_STOLEN or number > NF_STOP and kind != NF_QUEUE:
        raise ValueError(f"verdict {verdict!r} cannot be given: use NF_DROP, NF_ACCEPT, NF_QUEUE, "
                         "NF_REPEAT or NF_STOP")
    return number


def names_of(mask):
    """Flags by name; bits without one as a number."""
    names = [name.upper() for name, flag in FLAGS.items() if mask & flag]
    rest = mask & ~sum(FLAGS.values())
    return " and ".join(names + [f"{rest:#x}"] * (rest != 0)) or "0"


def handle_without_queues(callbacks, *, int fd=-1):
    """A handle that calls these callbacks, by queue number, and has no queue of the kernel's.

    Their verdicts go to the datagram socket ``fd``, with -1 nowhere: this is how handle_packet() is
    tested without a kernel.
    """
    cdef NetfilterQueueHandle handle = open()
    cdef Registration queue
    handle.outbox = Outbox(fd, 0)
    for number, callback in callbacks.items():
        queue = Registration.__new__(Registration)
        queue.number = number
        queue.callback = callback
        handle.queues[number] = queue
    return handle


live_handles = weakref.WeakSet()


def begin_in_child():
    cdef NetfilterQueueHandle handle
    for handle in list(live_handles):
        handle.begin_in_child()


os.register_at_fork(after_in_child=begin_in_child)

# Users know the classes by the public module's name.
(<PyTypeObject *> NetfilterQueueHandle).tp_name = b"netfilterqueue.lowlevel.NetfilterQueueHandle"
(<PyTypeObject *> NetfilterQueueQueueHandle).tp_name = (
    b"netfilterqueue.lowlevel.NetfilterQueueQueueHandle")
(<PyTypeObject *> NetfilterQueueData).tp_name = b"netfilterqueue.lowlevel.NetfilterQueueData"

"""``Packet`` and ``Batch``: what came with one read, decoded, and the verdicts on it."""
cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES, PyBUF_WRITABLE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_WarnEx
from cpython.object cimport PyTypeObject
from libc.stdint cimport uint16_t, uint32_t

from netfilterqueue._changes cimport PacketChanges
from netfilterqueue._channel cimport DEBUG, Channel, Slab, alive_now, datagram_in
from netfilterqueue._checksums cimport protocol_of, require_fit, with_checksums
from netfilterqueue._netlink cimport length_of, next_message, value_of
from netfilterqueue._nfqueue cimport (
    Decision, KNOWN_GID, KNOWN_UID, KNOWN_VLAN, decode_packet, find_rare, is_packet, is_truncated,
    original_length,
)
from netfilterqueue._outbox cimport NO_DEFAULT, Outbox, unsettled
from netfilterqueue._threads cimport add_to, add_to_total
from netfilterqueue._uapi cimport (
    AF_BRIDGE, NFQA_CT, NFQA_CT_INFO, NFQA_L2HDR, NFQA_SECCTX, NFQA_SKB_CSUMNOTREADY,
    NFQA_SKB_CSUM_NOTVERIFIED, NFQA_SKB_GSO, NF_ACCEPT, NF_DROP, NF_QUEUE, NF_REPEAT, NF_STOP,
    NF_VERDICT_FLAG_QUEUE_BYPASS, NF_VERDICT_MASK, NF_VERDICT_QBITS, NLMSG_MIN_TYPE, nlattr,
    nlmsghdr,
)

import os

from netfilterqueue import conntrack
from netfilterqueue._arguments import bytes_of, integer
from netfilterqueue.constants import PROTOCOLS, Verdict
from netfilterqueue.vlan import Vlan

# Always the same, as Python remembers each text of a warning.
cdef char *ABANDONED = (
    "a packet was let go of undecided, and stays in the kernel's queue until unbind(): decide "
    "every packet, keep those that are decided later, or bind with default_verdict"
)

# How the struct module writes the items of a payload, for Py_buffer.
cdef char *UNSIGNED_BYTES = "B"


cdef Batch new_batch(Slab slab, Outbox outbox, Batch used):
    """The packets of a read; ``used``, an earlier one or None, serves again if nobody needs it."""
    cdef Batch batch = used
    if used is None or used.packets:
        batch = Batch.__new__(Batch)
    batch.slab = slab
    batch.outbox = outbox
    batch.forks = outbox.waiting.forks
    batch.undecided = batch.remaining = slab.messages
    batch.slot = 0
    batch.rest = datagram_in(slab, 0)
    return batch


# No part of a reference cycle: it knows neither the queue nor its packets.
@cython.final
@cython.no_gc
@cython.freelist(8)
cdef class Batch:

    cdef Packet next(self, Packet used, object owner, Tally *tally):
        """The next packet, or None when all have been handed out. ``used``, one that is done with,
        or None, serves again."""
        cdef const nlmsghdr *message
        cdef size_t length
        cdef Packet packet = used
        if not self.remaining:
            return None
        if used is None:
            # First of all: this can start the garbage collector, and so any code, on any thread.
            packet = Packet.__new__(Packet)
        while self.remaining:
            message = next_message(&self.rest, &length)
            if message is NULL:
                self.slot += 1
                self.rest = datagram_in(self.slab, self.slot)
            elif message.nlmsg_type >= NLMSG_MIN_TYPE:
                self.remaining -= 1
                if self.unwrap(packet, message, length, tally):
                    packet.owner = owner
                    break
                self.undecided -= 1
        if not self.remaining:
            self.end()
        return packet if packet.batch is not None else None

    cdef bint unwrap(self, Packet packet, const nlmsghdr *message, size_t length,
                     Tally *tally) noexcept:
        """Make it the packet of a message; False, and one more in the tally, if it has none."""
        if not is_packet(message):
            tally.skipped.foreign += 1
            return False
        if not decode_packet(message, length, &packet.fields, &tally.skipped):
            tally.skipped.malformed += 1
            return False
        tally.packets += 1
        tally.bytes += packet.fields.payload_length
        tally.truncated += is_truncated(&packet.fields)
        # Also on one that serves again: somebody may have found it among all objects meanwhile.
        packet.has_new_mark = False
        packet.batch = self
        self.packets += 1
        packet.slab = self.slab
        self.slab.users += 1
        if DEBUG:
            add_to_total(&alive_now.packets, 1)
        return True

    cdef int end(self) except -1:
        """Give the slab back; packets not handed out are forgotten."""
        self.remaining = 0
        if self.slab is not None:
            self.slab.users -= 1
            self.slab = None
        return 0


# Its attributes are needed until the end (__dealloc__); cycles through packets are broken at their
# queue.
@cython.final
@cython.no_gc_clear
@cython.freelist(256)
cdef class Packet:
    """A packet that waits in the kernel for a verdict.

    A queue makes packets and hands them to its callback; they cannot be constructed. Attributes
    stay readable for as long as the object lives. The payload starts with the network header
    (IPv4, IPv6, …). It is borrowed from the receive buffer while the callback runs; what is to be
    read later must be kept by retain() or by a memoryview.

    ``memoryview(packet)`` is the payload without a copy: read-only, and valid for as long as the
    view exists. ``bytes(packet)`` and ``len(packet)`` are its copy and its length in bytes.

    Any thread may decide any packet.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("packets come from a NetfilterQueue and cannot be constructed; "
                        "for tests there is netfilterqueue.testing.packet()")

    def __dealloc__(self):
        if self.batch is None:
            return
        if DEBUG:
            add_to_total(&alive_now.packets, -1)
        with cython.critical_section(self.owner):
            if self.slab is not None:
                # First of all: whoever finds it there takes it to be whole.
                if self.place is not NULL:
                    self.place[0] = NULL
                self.slab.users -= 1
            try:
                if not is_decided(self):
                    self.abandon()
            finally:
                if not self.decided:
                    # It can never be decided: the others of its read need not wait for it.
                    self.batch.undecided -= 1
                # From now on, the batch may serve for another read.
                self.batch.packets -= 1

    # What the kernel said

    @property
    def id(self):
        """The kernel's number for this packet in its queue, counting from 1 (NFQA_PACKET_HDR)."""
        return self.fields.id

    @property
    def queue_num(self):
        """The number of the queue that it came from."""
        return self.fields.queue_num

    @property
    def hw_protocol(self):
        """The link layer's protocol number: 0x0800 for IPv4, 0x86DD for IPv6 (NFQA_PACKET_HDR)."""
        return self.fields.hw_protocol

    @property
    def hook(self):
        """The netfilter hook that queued it, a value of ``Hook`` (NFQA_PACKET_HDR)."""
        return self.fields.hook

    @property
    def mark(self):
        """The mark that it came with; set_mark() does not change it (NFQA_MARK)."""
        return self.fields.mark

    @property
    def indev(self):
        """The input interface's index, 0 where there is none (NFQA_IFINDEX_INDEV)."""
        return self.fields.indev

    @property
    def outdev(self):
        """The output interface's index, 0 where there is none (NFQA_IFINDEX_OUTDEV)."""
        return self.fields.outdev

    @property
    def physindev(self):
        """The input port's index of a bridged packet, else 0 (NFQA_IFINDEX_PHYSINDEV)."""
        return self.fields.physindev

    @property
    def physoutdev(self):
        """The output port's index of a bridged packet, else 0 (NFQA_IFINDEX_PHYSOUTDEV)."""
        return self.fields.physoutdev

    @property
    def indev_name(self):
        """The input interface's name as it is now, None where there is no such interface: looked up
        in the network namespace of the queue, and thus only until the queue is closed."""
        return self.interface_name(self.fields.indev)

    @property
    def outdev_name(self):
        """The output interface's name, found as indev_name is."""
        return self.interface_name(self.fields.outdev)

    @property
    def physindev_name(self):
        """The name of a bridged packet's input port, found as indev_name is."""
        return self.interface_name(self.fields.physindev)

    @property
    def physoutdev_name(self):
        """The name of a bridged packet's output port, found as indev_name is."""
        return self.interface_name(self.fields.physoutdev)

    cdef object interface_name(self, uint32_t index):
        cdef Channel channel
        if not index or self.batch is None:
            return None
        channel = self.batch.outbox.descriptor_owner
        if channel is not None:
            with cython.critical_section(self.owner):
                return channel.interface_name(index)
        return self.owner.get(index) if isinstance(self.owner, dict) else None

    @property
    def uid(self):
        """The number of the user that owns the socket which sent it, None where the kernel does not
        say: it does only for local senders, and if it was asked to (NFQA_UID)."""
        return self.fields.uid if self.fields.known & KNOWN_UID else None

    @property
    def gid(self):
        """The number of that user's group, None where the kernel does not say (NFQA_GID)."""
        return self.fields.gid if self.fields.known & KNOWN_GID else None

    @property
    def secctx(self):
        """The security context that a rule (SECMARK) has given it, None where there is none or the
        kernel was not asked to say (NFQA_SECCTX)."""
        cdef bytes context = self.rare_value(NFQA_SECCTX)
        return None if context is None else os.fsdecode(context.rstrip(b"\0"))

    @property
    def conntrack(self):
        """The connection that it belongs to, a ``netfilterqueue.conntrack.Conntrack``, decoded each
        time. None where it is not tracked or the kernel was not asked to say (NFQA_CT)."""
        cdef bytes content = self.rare_value(NFQA_CT)
        if content is None:
            return None
        return conntrack.decode(content, self.rare_value(NFQA_CT_INFO))

    @property
    def vlan(self):
        """The VLAN tag of a packet of the bridge family, a ``netfilterqueue.vlan.Vlan``; None where
        there is none (NFQA_VLAN)."""
        if not self.fields.known & KNOWN_VLAN:
            return None
        return Vlan(self.fields.vlan_proto, self.fields.vlan_tci)

    @property
    def l2_header(self):
        """The link layer's header of a packet of the bridge family as bytes, None for others
        (NFQA_L2HDR)."""
        return self.rare_value(NFQA_L2HDR)

    cdef bytes rare_value(self, uint16_t kind):
        cdef const nlattr *attribute
        with cython.critical_section(self.owner):
            attribute = find_rare(&self.fields, kind)
            if attribute is NULL:
                return None
            return PyBytes_FromStringAndSize(value_of(attribute), length_of(attribute))

    @property
    def priority(self):
        """The priority by which it queues at an interface, 0 by default (NFQA_PRIORITY)."""
        return self.fields.priority

    @property
    def cgroup_classid(self):
        """The class that a net_cls control group gives to the socket which sent it, 0 by default
        (NFQA_CGROUP_CLASSID, since Linux 6.4)."""
        return self.fields.cgroup_classid

    @property
    def original_len(self):
        """The packet's length in bytes, also where fewer were copied; 0 where none were, in
        COPY_META mode (NFQA_CAP_LEN)."""
        return original_length(&self.fields)

    @property
    def truncated(self):
        """Whether only the payload's beginning was copied: the packet is longer than the queue's
        range, or than the 65531 bytes that fit into a message."""
        return is_truncated(&self.fields)

    @property
    def checksum_ready(self):
        """False: the packet is local, and its transport checksum is left to the network card, or
        to nobody; there is the pseudo-header's sum in its place (NFQA_SKB_INFO)."""
        return not self.fields.skb_info & NFQA_SKB_CSUMNOTREADY

    @property
    def checksum_verified(self):
        """False: the packet came in, and neither the network card nor the kernel has verified its
        checksum so far (NFQA_SKB_INFO)."""
        return not self.fields.skb_info & NFQA_SKB_CSUM_NOTVERIFIED

    @property
    def gso(self):
        """True: it stands for several packets, into which it is cut when it is sent
        (NFQA_SKB_INFO)."""
        return bool(self.fields.skb_info & NFQA_SKB_GSO)

    def get_hw(self):
        """The source's hardware address as bytes, six on Ethernet; None where there is none, as on
        the OUTPUT hook (NFQA_HWADDR)."""
        if not self.fields.hw_length:
            return None
        return PyBytes_FromStringAndSize(<const char *> self.fields.hw_address,
                                         self.fields.hw_length)

    def get_timestamp(self):
        """When the kernel received it, in seconds since the epoch as time.time() counts them, with
        microseconds; 0.0 where there is no time stamp, as on OUTPUT and POSTROUTING
        (NFQA_TIMESTAMP)."""
        # Python's integers, for one rounding only: with two, the last digit can be wrong.
        return (<object> self.fields.seconds * 1000000 + self.fields.microseconds) / 1000000

    # The payload

    def get_payload(self):
        """The payload as bytes: what set_payload() was given, else what retain() kept, else the
        packet's own. Raises RuntimeError where there is none (COPY_META), and after the callback
        has returned if the payload was not retained."""
        with cython.critical_section(self.owner):
            return self.payload()

    def get_payload_len(self):
        """The payload's length in bytes: after set_payload(), the new one's."""
        return len(self)

    def retain(self):
        """Keep a copy of the payload for use after the callback. Can be repeated; after
        set_payload() it keeps the new bytes. Raises RuntimeError as get_payload() does."""
        with cython.critical_section(self.owner):
            if self.replacement is not None or self.retained is None:
                self.retained_own = self.replacement is None
                self.retained = self.payload()

    def set_payload(self, payload, *, checksums=False, truncate=False):
        """Let the packet go on with these bytes, any bytes-like object of 1 to 65531 bytes that
        starts with the network header, once it is accepted (NFQA_PAYLOAD). None: with its own.

        With ``checksums=True``, a copy of an IPv4 or IPv6 packet goes on, in which lengths of IP
        and UDP are those of what was given, and the checksums of IPv4, TCP, UDP, ICMP and ICMPv6
        are right. A UDP checksum of 0, "none", stays so in IPv4. True is returned then; but False
        where nothing below the IP header could be made right: in a fragment, whose checksum covers
        the others too, and for other protocols. Else lengths and checksums are up to the caller,
        and False is returned. With ``gso``, only TCP can be replaced, by as many bytes.

        A packet that was copied in part only, see ``truncated``, would lose the rest: with
        ``truncate=True`` it does, or else this raises RuntimeError.

        Raises TypeError for what is not bytes-like, and ValueError for a wrong length, or where
        checksums are wanted for what is no such packet, or where they cannot be made right.
        """
        cdef bytes replacement = None
        cdef bint right = False
        if payload is not None:
            replacement = payload if type(payload) is bytes else bytes_of("payload", payload)
            require_fit(replacement, &self.fields, truncate)
            if checksums:
                replacement = with_checksums(replacement, self.unfinished(), &right)
        with cython.critical_section(self.owner):
            self.replacement = replacement
        return right

    cdef bytes unfinished(self):
        """What came, if its checksum is not ready, else None; empty where it is gone."""
        if not self.fields.skb_info & NFQA_SKB_CSUMNOTREADY:
            return None
        with cython.critical_section(self.owner):
            if self.slab is None or self.fields.payload is NULL:
                return self.retained if self.retained_own and self.retained is not None else b""
            return PyBytes_FromStringAndSize(self.fields.payload, self.fields.payload_length)

    def __bool__(self):
        return True     # whatever its length: programs say `if packet` for `is not None`

    def __len__(self):
        with cython.critical_section(self.owner):
            if self.replacement is not None:
                return len(self.replacement)
            return self.fields.payload_length

    def __bytes__(self):
        return self.get_payload()

    def __getbuffer__(self, Py_buffer *view, int flags):
        cdef bytes payload
        if flags & PyBUF_WRITABLE:
            raise BufferError("a packet's payload is read-only; give a new one to set_payload()")
        # The exporter is who owns the bytes, not the packet: they are safe for as long as the
        # view lives, whatever is done to the packet meanwhile.
        with cython.critical_section(self.owner):
            payload = self.any_payload()
            if payload is not None:
                view.obj = payload
                view.buf = PyBytes_AS_STRING(payload)
                view.len = PyBytes_GET_SIZE(payload)
            else:
                add_to(&self.slab.views, 1)
                view.obj = self.slab
                view.buf = <void *> self.fields.payload
                view.len = self.fields.payload_length
        view.readonly = True
        view.itemsize = 1
        view.format = UNSIGNED_BYTES if flags & PyBUF_FORMAT else NULL
        view.ndim = 1
        view.shape = &view.len if flags & PyBUF_ND else NULL
        view.strides = &view.itemsize if flags & PyBUF_STRIDES == PyBUF_STRIDES else NULL
        view.suboffsets = NULL
        view.internal = NULL

    cdef bytes any_payload(self):
        """The payload where it is bytes of its own, None where it is still borrowed."""
        if self.replacement is not None:
            return self.replacement
        if self.retained is not None:
            return self.retained
        if self.fields.payload is NULL:
            raise RuntimeError(
                "Packet has no payload -- perhaps you're using COPY_META mode?")
        if self.slab is None:
            raise RuntimeError(
                "Payload data is no longer available. You must call retain() within the "
                "user_callback in order to copy the payload if you need to expect it after your "
                "callback has returned.")
        return None

    cdef bytes payload(self):
        cdef bytes payload = self.any_payload()
        if payload is not None:
            return payload
        return PyBytes_FromStringAndSize(self.fields.payload, self.fields.payload_length)

    cdef int keep_payload(self) except -1:
        """Have the payload, if there is any, outlive the read."""
        with cython.critical_section(self.owner):
            if self.slab is not None and self.fields.payload is not NULL:
                self.retained = PyBytes_FromStringAndSize(self.fields.payload,
                                                          self.fields.payload_length)
                self.retained_own = True
            return self.end_borrowing()

    cdef int end_borrowing(self) except -1:
        """The bytes in the slab may be used again from now on."""
        with cython.critical_section(self.owner):
            if self.slab is not None:
                if self.fields.rare.left:
                    self.keep_rare()
                self.slab.users -= 1
                if self.place is not NULL:
                    self.place[0] = NULL
                    self.place = NULL
                self.slab = None
        return 0

    cdef bint renew(self) except -1:
        """End borrowing, and make the packet as new, to serve for another message. False: somebody
        else has it, or something is left to be done at its end."""
        self.end_borrowing()
        if not is_free(self) or not is_decided(self):
            return False
        self.batch.packets -= 1
        self.batch = self.owner = None
        self.decided = False
        if DEBUG:
            add_to_total(&alive_now.packets, -1)
        return True

    cdef int keep_rare(self) except -1:
        self.rare = PyBytes_FromStringAndSize(self.fields.rare.at, self.fields.rare.left)
        self.fields.rare.at = PyBytes_AS_STRING(self.rare)
        return 0

    def __str__(self):
        cdef bytes payload
        try:
            payload = self.get_payload()
        except RuntimeError:
            return f"{len(self)} byte packet, contents unretained"
        protocol = PROTOCOLS.get(protocol_of(payload), "Unknown protocol")
        return f"{protocol} packet, {len(payload)} bytes"

    # Changes, and the verdict that carries them out

    def get_mark(self):
        """The mark given by set_mark(), else the one that the packet came with."""
        with cython.critical_section(self.owner):
            return self.new_mark if self.has_new_mark else self.fields.mark

    def set_mark(self, mark):
        """Give the packet a mark of 32 bits, for later rules to match; the verdict sets it
        (NFQA_MARK). Raises OverflowError outside 0..4294967295 and TypeError for no number."""
        if isinstance(mark, (str, bytes, bytearray)) or not hasattr(type(mark), "__int__"):
            raise TypeError(f"a mark is an integer, not {type(mark).__name__}")
        number = int(mark)
        if not 0 <= number <= 0xFFFFFFFF:
            raise OverflowError(f"mark {mark} does not fit into 32 bits: use 0 to 4294967295")
        with cython.critical_section(self.owner):
            self.new_mark = number
            self.has_new_mark = True

    def set_priority(self, priority):
        """Give the packet a priority of 32 bits, by which it queues at an interface; the verdict
        sets it (NFQA_PRIORITY, since Linux 5.18). Raises ValueError outside 0..4294967295."""
        with cython.critical_section(self.owner):
            self.any_changes().set_priority(priority)

    def set_conntrack_mark(self, mark):
        """Give the packet's connection a mark of 32 bits; the verdict sets it (NFQA_CT).

        Raises ValueError outside 0..4294967295, and RuntimeError for a packet without connection
        information: the queue must be bound with ``conntrack=True``.
        """
        self.require_connection()
        with cython.critical_section(self.owner):
            self.any_changes().set_conntrack_mark(mark)

    def set_conntrack_labels(self, labels):
        """Give the packet's connection these labels, 1 to 16 bytes, and no others; the verdict sets
        them (NFQA_CT).

        The kernel has room for them where a rule with the match ``connlabel`` was there before the
        connection began, and says nothing otherwise. Raises ValueError for another length, and
        RuntimeError for a packet without connection information.
        """
        self.require_connection()
        with cython.critical_section(self.owner):
            self.any_changes().set_conntrack_labels(labels)

    def set_vlan(self, proto, tci):
        """Give a packet of the bridge family a VLAN tag, of 16 bits each; the verdict sets it
        (NFQA_VLAN). Raises ValueError outside 0..65535, and RuntimeError for other packets."""
        self.require_bridged()
        with cython.critical_section(self.owner):
            self.any_changes().set_vlan(proto, tci)

    def set_l2_header(self, l2_header):
        """Give a packet of the bridge family another link layer's header, any bytes-like object as
        long as its own; the verdict sets it (NFQA_L2HDR).

        Raises ValueError for another length, and RuntimeError for packets that have none.
        """
        self.require_bridged()
        with cython.critical_section(self.owner):
            self.any_changes().set_l2_header(l2_header, len(self.rare_value(NFQA_L2HDR) or b""))

    cdef PacketChanges any_changes(self):
        if self.changes is None:
            self.changes = PacketChanges.__new__(PacketChanges)
        return self.changes

    # The kernel says nothing where a change has no effect.

    cdef int require_bridged(self) except -1:
        if self.fields.family != AF_BRIDGE:
            raise RuntimeError("this packet does not come from the bridge family: only those that "
                               "do have a VLAN tag and a link layer's header that can be set")
        return 0

    cdef int require_connection(self) except -1:
        if self.rare_value(NFQA_CT) is None:
            raise RuntimeError("this packet came without information about its connection: bind "
                               "with conntrack=True; packets that are not tracked have none")
        return 0

    @property
    def verdict(self):
        """The ``Verdict`` given, None as long as there is none."""
        with cython.critical_section(self.owner):
            return Verdict(self.given & NF_VERDICT_MASK) if is_decided(self) else None

    def accept(self):
        """Let the packet go on, with what was set (NF_ACCEPT).

        Like the other verdicts: RuntimeError if one has been given or the queue has been unbound,
        OSError if sending fails; the packet then counts as undecided.
        """
        self.decide(NF_ACCEPT)

    def drop(self):
        """Discard the packet (NF_DROP). Raises as accept() does."""
        self.decide(NF_DROP)

    def repeat(self):
        """Send the packet through the rules of this hook once more, with what was set (NF_REPEAT).
        Nothing else keeps it from coming back here. Raises as accept() does."""
        self.decide(NF_REPEAT)

    def stop(self):
        """Let the packet go on, with what was set, past all that follows at this hook: the tables
        that come later, and the kernel's own work there, such as the confirmation of a new
        connection (NF_STOP). Raises as accept() does."""
        self.decide(NF_STOP)

    def requeue(self, queue_num, bypass=False):
        """Send the packet, with what was set, to the queue ``queue_num`` (0 to 65535), where it
        goes on from here when it is accepted (NF_QUEUE).

        If nobody listens there it is dropped, or, with ``bypass``, accepted. Raises ValueError for
        another number, and as accept() does.
        """
        cdef uint32_t number = integer("queue_num", queue_num, 0, 0xFFFF)
        cdef uint32_t flag = NF_VERDICT_FLAG_QUEUE_BYPASS if bypass else 0
        self.decide(NF_QUEUE | number << NF_VERDICT_QBITS | flag)

    cdef int decide(self, uint32_t verdict) except -1:
        cdef Decision decision
        cdef bytes replacement
        decision.verdict = verdict
        decision.payload = NULL
        decision.payload_length = 0
        decision.changes = NULL
        with cython.critical_section(self.owner):
            decision.mark = self.new_mark
            decision.has_mark = self.has_new_mark
            # Another thread may set another one before this one is sent.
            replacement = self.replacement
            if replacement is not None:
                decision.payload = PyBytes_AS_STRING(replacement)
                decision.payload_length = <uint32_t> PyBytes_GET_SIZE(replacement)
            if self.changes is not None:
                decision.changes = &self.changes.values
            return self.send_decision(&decision)

    cdef int abandon(self) except -1:
        """Give the default verdict, or a warning: this is the end of the packet. What is raised
        here goes to sys.unraisablehook()."""
        cdef Outbox outbox = self.batch.outbox
        cdef int late_error = outbox.waiting.late_error
        if not outbox.cares_for(self.batch.forks):
            return 0
        if outbox.default_verdict == NO_DEFAULT:
            PyErr_WarnEx(ResourceWarning, ABANDONED, 1)
            return 0
        # That of other packets is for a call that can raise it.
        outbox.waiting.late_error = 0
        try:
            self.decide(outbox.default_verdict)
        finally:
            outbox.waiting.late_error = outbox.waiting.late_error or late_error
        return 0

    cdef int send_decision(self, const Decision *decision) except -1:
        cdef Outbox outbox
        cdef bint now
        if self.batch is None:
            raise RuntimeError("this packet came from no queue")
        outbox = self.batch.outbox
        while True:
            if is_decided(self):
                raise RuntimeError("Verdict already given for this packet")
            if outbox.closed:
                raise RuntimeError("Parent queue has already been unbound")
            # Making room may let other threads run, which may decide this packet.
            if not unsettled(outbox) or not outbox.make_room(decision):
                break
        now = outbox.add(self.fields.queue_num, self.fields.id, decision,
                         &self.batch.undecided, &self.flight)
        self.decided = True
        self.given = decision.verdict
        if now:
            outbox.finish()
        return 0


# Users know the class by the package's name, not the extension's.
(<PyTypeObject *> Packet).tp_name = b"netfilterqueue.Packet"

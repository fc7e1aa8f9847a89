"""The wire format of NFQUEUE: packet messages in, configuration and verdicts out.

Pure functions on memory: no sockets, no Python objects, so every path is tested on hand-made
messages. Attributes are those of <linux/netfilter/nfnetlink_queue.h>; integers are big endian.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from netfilterqueue._netlink cimport (
    Cursor, attributes_of, begin_nested, end_nested, length_of, nested_in, next_attribute,
    put_attribute, put_be16, put_be32, read_be16, read_be32, read_be64, type_of, value_of,
)
from netfilterqueue._uapi cimport (
    AF_UNSPEC, CTA_LABELS, CTA_MARK, NFNETLINK_V0, NFNL_SUBSYS_QUEUE, NFQA_CAP_LEN,
    NFQA_CFG_FLAGS, NFQA_CFG_MASK, NFQA_CGROUP_CLASSID, NFQA_CT, NFQA_CT_INFO, NFQA_EXP,
    NFQA_GID, NFQA_HWADDR, NFQA_IFINDEX_INDEV, NFQA_IFINDEX_OUTDEV, NFQA_IFINDEX_PHYSINDEV,
    NFQA_IFINDEX_PHYSOUTDEV, NFQA_L2HDR, NFQA_MARK, NFQA_PACKET_HDR, NFQA_PAYLOAD,
    NFQA_PRIORITY, NFQA_SECCTX, NFQA_SKB_INFO, NFQA_TIMESTAMP, NFQA_UID, NFQA_UNSPEC,
    NFQA_VERDICT_HDR, NFQA_VLAN, NFQA_VLAN_PROTO, NFQA_VLAN_TCI, NFQNL_CFG_CMD_BIND,
    NFQNL_CFG_CMD_UNBIND, NFQNL_MSG_CONFIG, NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT,
    NFQNL_MSG_VERDICT_BATCH, NLM_F_ACK, NLM_F_REQUEST, htonl, htons, nfgenmsg,
    nfq_nlmsg_cfg_put_cmd, nfq_nlmsg_cfg_put_params, nfq_nlmsg_cfg_put_qmaxlen, nfq_nlmsg_put,
    nfqnl_msg_packet_hdr, nfqnl_msg_packet_hw, nfqnl_msg_packet_timestamp,
    nfqnl_msg_verdict_hdr, nlattr, nlmsghdr,
)


cdef enum:
    # Bytes, more than any verdict takes without its payload.
    VERDICT_ROOM = 128
    # Words of 32 bits, more than any configuration message takes.
    REQUEST_WORDS = 32
    # What a packet message holds besides the payload, unless the kernel is asked for more.
    ATTRIBUTE_ROOM = 1024
    # The kernel never copies more: an attribute's length has 16 bits, its header 4 bytes.
    MAX_PAYLOAD = 65531


cdef struct PacketFields:
    uint32_t id
    uint32_t mark
    uint32_t indev               # interface indexes; 0: none
    uint32_t outdev
    uint32_t physindev
    uint32_t physoutdev
    uint16_t queue_num
    uint16_t hw_protocol
    uint8_t hook
    uint8_t family               # AF_INET, AF_INET6, AF_BRIDGE…: whose hook it is
    uint8_t hw_length            # bytes of hw_address that count; 0: none
    uint8_t known                # which of the optional fields are there, a sum of KNOWN_…
    uint8_t hw_address[8]
    uint32_t priority            # 0 is the kernel's word for none, of this and the next
    uint32_t cgroup_classid
    uint32_t skb_info            # a sum of NFQA_SKB_…
    uint32_t cap_len             # bytes of the whole packet; 0: no more than were copied
    uint64_t seconds             # since the epoch; 0 with microseconds 0: no time stamp
    uint64_t microseconds
    uint32_t uid                 # of the local sender, where known: 0 is root's
    uint32_t gid
    uint16_t vlan_proto          # of the outer tag, where known: 0 is a tag too
    uint16_t vlan_tci
    uint32_t payload_length
    const char *payload          # borrowed from the message; NULL: none
    uint32_t lost                # bytes of it that did not fit into the reader's buffer
    Cursor rare                  # borrowed: where the attributes are that is_rare() names


cdef inline uint64_t original_length(const PacketFields *fields) noexcept nogil:
    """Bytes of the whole packet, also where fewer were copied; 0 where none were."""
    cdef uint64_t copied = <uint64_t> fields.payload_length + fields.lost
    return copied if copied > fields.cap_len else fields.cap_len


cdef inline bint is_truncated(const PacketFields *fields) noexcept nogil:
    return fields.lost or fields.cap_len > fields.payload_length


cdef enum:
    # PacketFields.known
    KNOWN_UID = 1
    KNOWN_GID = 2
    KNOWN_VLAN = 4


cdef inline bint is_packet(const nlmsghdr *message) noexcept nogil:
    return message.nlmsg_type == ((NFNL_SUBSYS_QUEUE << 8) | NFQNL_MSG_PACKET)


cdef inline bint decode_u32(const nlattr *attribute, uint32_t *field) noexcept nogil:
    if length_of(attribute) != sizeof(uint32_t):
        return False
    field[0] = read_be32(value_of(attribute))
    return True


cdef inline bint decode_optional(const nlattr *attribute, uint32_t *field, uint8_t which,
                                 PacketFields *fields) noexcept nogil:
    if not decode_u32(attribute, field):
        return False
    fields.known |= which
    return True


cdef inline bint decode_header(const nlattr *attribute, PacketFields *fields) noexcept nogil:
    cdef const nfqnl_msg_packet_hdr *header
    # The kernel's struct is packed: 7 bytes.
    if length_of(attribute) != sizeof(nfqnl_msg_packet_hdr):
        return False
    header = <const nfqnl_msg_packet_hdr *> value_of(attribute)
    fields.id = read_be32(&header.packet_id)
    fields.hw_protocol = read_be16(&header.hw_protocol)
    fields.hook = header.hook
    return True


cdef inline bint decode_hw(const nlattr *attribute, PacketFields *fields) noexcept nogil:
    cdef const nfqnl_msg_packet_hw *hw
    cdef uint16_t length
    if length_of(attribute) != sizeof(nfqnl_msg_packet_hw):
        return False
    hw = <const nfqnl_msg_packet_hw *> value_of(attribute)
    length = read_be16(&hw.hw_addrlen)
    if length > sizeof(fields.hw_address):
        return False
    memcpy(fields.hw_address, hw.hw_addr, length)
    fields.hw_length = <uint8_t> length
    return True


cdef inline bint decode_timestamp(const nlattr *attribute, PacketFields *fields) noexcept nogil:
    cdef const char *value = value_of(attribute)
    if length_of(attribute) != sizeof(nfqnl_msg_packet_timestamp):
        return False
    fields.seconds = read_be64(value)
    fields.microseconds = read_be64(value + sizeof(uint64_t))
    return True


cdef inline bint decode_vlan(const nlattr *attribute, PacketFields *fields) noexcept nogil:
    cdef Cursor cursor = nested_in(attribute)
    cdef const nlattr *inner
    cdef uint16_t proto = 0
    cdef uint16_t tci = 0
    cdef int found = 0
    while True:
        inner = next_attribute(&cursor)
        if inner is NULL:
            break
        if type_of(inner) != NFQA_VLAN_PROTO and type_of(inner) != NFQA_VLAN_TCI:
            continue
        if length_of(inner) != sizeof(uint16_t):
            return False
        if type_of(inner) == NFQA_VLAN_PROTO:
            proto = read_be16(value_of(inner))
            found |= 1
        else:
            tci = read_be16(value_of(inner))
            found |= 2
    if cursor.left or found != 3:
        return False
    fields.vlan_proto = proto
    fields.vlan_tci = tci
    fields.known |= KNOWN_VLAN
    return True


cdef inline bint decode_payload(const nlattr *attribute, size_t length,
                                PacketFields *fields) noexcept nogil:
    fields.payload = value_of(attribute)
    fields.payload_length = <uint32_t> length
    fields.lost = <uint32_t> (length_of(attribute) - length)
    return True


# Attributes that few queues ask for, and that have no fixed length: a packet remembers only where
# they are, and they are looked up when somebody wants to know.

cdef inline bint is_rare(uint16_t kind) noexcept nogil:
    return kind == NFQA_CT or kind == NFQA_CT_INFO or kind == NFQA_SECCTX or kind == NFQA_L2HDR


cdef inline bint is_sound(const nlattr *attribute) noexcept nogil:
    """Whether a rare attribute has a length that its type can have, and what it nests is whole."""
    cdef Cursor cursor
    if type_of(attribute) == NFQA_CT_INFO:
        return length_of(attribute) == sizeof(uint32_t)
    if type_of(attribute) == NFQA_CT:
        cursor = nested_in(attribute)
        while next_attribute(&cursor) is not NULL:
            pass
        return not cursor.left
    return length_of(attribute) > 0


cdef inline bint note_rare(const nlattr *attribute, PacketFields *fields) noexcept nogil:
    if not is_sound(attribute):
        return False
    if not fields.rare.left:
        fields.rare.at = <const char *> attribute
    fields.rare.left = <const char *> attribute + attribute.nla_len - fields.rare.at
    return True


cdef inline const nlattr *find_rare(const PacketFields *fields, uint16_t kind) noexcept nogil:
    """The rare attribute of a type, or NULL; of one that is repeated, the last."""
    cdef Cursor cursor = fields.rare
    cdef const nlattr *found = NULL
    cdef const nlattr *attribute
    while True:
        attribute = next_attribute(&cursor)
        if attribute is NULL:
            return found
        if type_of(attribute) == kind and is_sound(attribute):
            found = attribute


cdef inline bint decode_attribute(const nlattr *attribute, PacketFields *fields,
                                  bint *identified) noexcept nogil:
    """Take one attribute over into ``fields``; False where its length is not the type's, or where
    the type is none that is read here."""
    cdef uint16_t kind = type_of(attribute)
    if kind == NFQA_PACKET_HDR:
        if not decode_header(attribute, fields):
            return False
        identified[0] = True
        return True
    if kind == NFQA_PAYLOAD:
        return decode_payload(attribute, length_of(attribute), fields)
    if kind == NFQA_MARK:
        return decode_u32(attribute, &fields.mark)
    if kind == NFQA_IFINDEX_INDEV:
        return decode_u32(attribute, &fields.indev)
    if kind == NFQA_IFINDEX_OUTDEV:
        return decode_u32(attribute, &fields.outdev)
    if kind == NFQA_IFINDEX_PHYSINDEV:
        return decode_u32(attribute, &fields.physindev)
    if kind == NFQA_IFINDEX_PHYSOUTDEV:
        return decode_u32(attribute, &fields.physoutdev)
    if kind == NFQA_HWADDR:
        return decode_hw(attribute, fields)
    if kind == NFQA_TIMESTAMP:
        return decode_timestamp(attribute, fields)
    if kind == NFQA_SKB_INFO:
        return decode_u32(attribute, &fields.skb_info)
    if kind == NFQA_PRIORITY:
        return decode_u32(attribute, &fields.priority)
    if kind == NFQA_CAP_LEN:
        return decode_u32(attribute, &fields.cap_len)
    if kind == NFQA_CGROUP_CLASSID:
        return decode_u32(attribute, &fields.cgroup_classid)
    if kind == NFQA_UID:
        return decode_optional(attribute, &fields.uid, KNOWN_UID, fields)
    if kind == NFQA_GID:
        return decode_optional(attribute, &fields.gid, KNOWN_GID, fields)
    if kind == NFQA_VLAN:
        return decode_vlan(attribute, fields)
    return is_rare(kind) and note_rare(attribute, fields)


cdef struct Skipped:
    uint64_t foreign            # messages that are no packets
    uint64_t malformed          # packet messages without a readable header
    uint64_t broken_attributes  # of a length that their type cannot have
    uint64_t unread_attributes  # of types that are not read here


cdef inline void note_skipped(const nlattr *attribute, Skipped *skipped) noexcept nogil:
    cdef uint16_t kind = type_of(attribute)
    if (kind == NFQA_UNSPEC or kind > NFQA_CGROUP_CLASSID or kind == NFQA_VERDICT_HDR
            or kind == NFQA_EXP):
        skipped.unread_attributes += 1
    else:
        skipped.broken_attributes += 1


cdef inline bint decode_packet(const nlmsghdr *message, size_t length, PacketFields *fields,
                               Skipped *skipped) noexcept nogil:
    """Decode a packet message of ``length`` bytes; False where it has no readable NFQA_PACKET_HDR,
    without which nothing can be decided.

    What is broken or unknown is counted as ``skipped``. Of one that is repeated the last
    counts, as everywhere in netlink. The payload comes last, so a message that did not fit into
    the reader's buffer still gives everything but the payload's end.
    """
    cdef Cursor cursor = attributes_of(message, length, sizeof(nfgenmsg))
    cdef const nfgenmsg *family = <const nfgenmsg *> (<const char *> message + sizeof(nlmsghdr))
    cdef const nlattr *attribute
    cdef bint identified = False
    memset(fields, 0, sizeof(PacketFields))
    if length < sizeof(nlmsghdr) + sizeof(nfgenmsg):
        return False
    fields.family = family.nfgen_family
    fields.queue_num = read_be16(&family.res_id)
    while True:
        attribute = next_attribute(&cursor)
        if attribute is NULL:
            break
        if not decode_attribute(attribute, fields, &identified):
            note_skipped(attribute, skipped)
    if cursor.left >= sizeof(nlattr):
        attribute = <const nlattr *> cursor.at
        if attribute.nla_len > cursor.left and type_of(attribute) == NFQA_PAYLOAD:
            decode_payload(attribute, cursor.left - sizeof(nlattr), fields)
            cursor.left = 0
    if cursor.left:
        skipped.broken_attributes += 1
    if fields.payload is NULL and length < message.nlmsg_len:
        fields.lost = <uint32_t> (message.nlmsg_len - length)
    return identified


cdef inline nlmsghdr *begin_request(uint32_t *buffer, uint16_t queue_num) noexcept nogil:
    cdef nlmsghdr *message = nfq_nlmsg_put(<char *> buffer, NFQNL_MSG_CONFIG, queue_num)
    message.nlmsg_flags |= NLM_F_ACK
    return message


cdef inline void put_flags(nlmsghdr *message, uint32_t mask, uint32_t flags) noexcept nogil:
    put_be32(message, NFQA_CFG_MASK, mask)
    put_be32(message, NFQA_CFG_FLAGS, flags)


cdef inline nlmsghdr *encode_bind(uint32_t *buffer, uint16_t queue_num, uint8_t mode,
                                  uint32_t copy_range, uint32_t max_len,
                                  uint32_t flags) noexcept nogil:
    """Bind and configure in one message: with several there is a moment in which the queue is in
    COPY_NONE and drops what comes."""
    cdef nlmsghdr *message = begin_request(buffer, queue_num)
    nfq_nlmsg_cfg_put_cmd(message, 0, NFQNL_CFG_CMD_BIND)
    nfq_nlmsg_cfg_put_params(message, mode, <int> copy_range)
    nfq_nlmsg_cfg_put_qmaxlen(message, max_len)
    if flags:
        put_flags(message, flags, flags)
    return message


cdef inline nlmsghdr *encode_unbind(uint32_t *buffer, uint16_t queue_num) noexcept nogil:
    cdef nlmsghdr *message = begin_request(buffer, queue_num)
    nfq_nlmsg_cfg_put_cmd(message, 0, NFQNL_CFG_CMD_UNBIND)
    return message


# Changes of a queue that is bound.

cdef inline nlmsghdr *encode_mode(uint32_t *buffer, uint16_t queue_num, uint8_t mode,
                                  uint32_t copy_range) noexcept nogil:
    cdef nlmsghdr *message = begin_request(buffer, queue_num)
    nfq_nlmsg_cfg_put_params(message, mode, <int> copy_range)
    return message


cdef inline nlmsghdr *encode_max_len(uint32_t *buffer, uint16_t queue_num,
                                     uint32_t max_len) noexcept nogil:
    cdef nlmsghdr *message = begin_request(buffer, queue_num)
    nfq_nlmsg_cfg_put_qmaxlen(message, max_len)
    return message


cdef inline nlmsghdr *encode_flags(uint32_t *buffer, uint16_t queue_num, uint32_t mask,
                                   uint32_t flags) noexcept nogil:
    """Set the flags (NFQA_CFG_F_…) that are in ``mask`` as they are in ``flags``."""
    cdef nlmsghdr *message = begin_request(buffer, queue_num)
    put_flags(message, mask, flags)
    return message


cdef inline nlmsghdr *encode_family(uint32_t *buffer, uint16_t family,
                                    uint8_t command) noexcept nogil:
    """Bind or unbind an address family as a whole, which kernels since 3.8 take for granted."""
    cdef nlmsghdr *message = begin_request(buffer, 0)
    nfq_nlmsg_cfg_put_cmd(message, family, command)
    return message


cdef inline nlmsghdr *encode_verdict_up_to(uint32_t *buffer, uint16_t queue_num, uint32_t id,
                                           uint32_t verdict) noexcept nogil:
    """One verdict for all packets of a queue that were queued no later than this one."""
    cdef nlmsghdr *message = nfq_nlmsg_put(<char *> buffer, NFQNL_MSG_VERDICT_BATCH, queue_num)
    cdef nfqnl_msg_verdict_hdr header
    header.verdict = htonl(verdict)
    header.id = htonl(id)
    put_attribute(message, NFQA_VERDICT_HDR, &header, sizeof(header))
    return message


cdef struct Changes:
    uint32_t which               # of those below, a sum of CHANGE_…
    uint32_t priority
    uint32_t conntrack_mark
    uint8_t conntrack_labels[16]
    uint16_t vlan_proto
    uint16_t vlan_tci
    const char *l2_header
    size_t l2_header_length


cdef enum:
    CHANGE_PRIORITY = 1
    CHANGE_CONNTRACK_MARK = 2
    CHANGE_CONNTRACK_LABELS = 4
    CHANGE_VLAN = 8
    CHANGE_L2_HEADER = 16


cdef struct Decision:
    uint32_t verdict
    uint32_t mark
    bint has_mark
    const char *payload          # NULL: the packet leaves as it came
    uint32_t payload_length
    const Changes *changes       # what else changes; NULL: nothing


cdef inline size_t decision_size(const Decision *decision) noexcept nogil:
    """No less than what encode_verdict() writes, in bytes."""
    cdef size_t size = VERDICT_ROOM + decision.payload_length
    if decision.changes is not NULL:
        size += decision.changes.l2_header_length
    return size


cdef inline void encode_changes(nlmsghdr *message, const Changes *changes) noexcept nogil:
    cdef nlattr *nest
    if changes.which & CHANGE_PRIORITY:
        put_be32(message, NFQA_PRIORITY, changes.priority)
    if changes.which & (CHANGE_CONNTRACK_MARK | CHANGE_CONNTRACK_LABELS):
        nest = begin_nested(message, NFQA_CT)
        if changes.which & CHANGE_CONNTRACK_MARK:
            put_be32(message, CTA_MARK, changes.conntrack_mark)
        if changes.which & CHANGE_CONNTRACK_LABELS:
            put_attribute(message, CTA_LABELS, changes.conntrack_labels,
                          sizeof(changes.conntrack_labels))
        end_nested(message, nest)
    if changes.which & CHANGE_VLAN:
        nest = begin_nested(message, NFQA_VLAN)
        put_be16(message, NFQA_VLAN_PROTO, changes.vlan_proto)
        put_be16(message, NFQA_VLAN_TCI, changes.vlan_tci)
        end_nested(message, nest)
    if changes.which & CHANGE_L2_HEADER:
        put_attribute(message, NFQA_L2HDR, changes.l2_header, changes.l2_header_length)


cdef inline size_t encode_verdict(char *buffer, uint16_t queue_num, uint32_t id,
                                  const Decision *decision, uint32_t sequence) noexcept nogil:
    """Write one verdict message and return its length in bytes, a multiple of 4.

    Written out, where the configuration above calls libnetfilter_queue: at a low packet rate, every
    page of another library that a verdict touches costs about as much as the whole message.
    """
    cdef nlmsghdr *message = <nlmsghdr *> buffer
    cdef nfgenmsg *family = <nfgenmsg *> (buffer + sizeof(nlmsghdr))
    cdef nfqnl_msg_verdict_hdr header
    message.nlmsg_len = sizeof(nlmsghdr) + sizeof(nfgenmsg)
    message.nlmsg_type = (NFNL_SUBSYS_QUEUE << 8) | NFQNL_MSG_VERDICT
    message.nlmsg_flags = NLM_F_REQUEST
    message.nlmsg_seq = sequence
    message.nlmsg_pid = 0
    family.nfgen_family = AF_UNSPEC
    family.version = NFNETLINK_V0
    family.res_id = htons(queue_num)
    header.verdict = htonl(decision.verdict)
    header.id = htonl(id)
    put_attribute(message, NFQA_VERDICT_HDR, &header, sizeof(header))
    if decision.has_mark:
        put_be32(message, NFQA_MARK, decision.mark)
    if decision.changes is not NULL:
        encode_changes(message, decision.changes)
    if decision.payload is not NULL:
        put_attribute(message, NFQA_PAYLOAD, decision.payload, decision.payload_length)
    return message.nlmsg_len

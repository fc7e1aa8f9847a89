"""The wire format of NFQUEUE: packet messages in, configuration and verdicts out.

Pure functions on memory: no sockets, no Python objects, so every path is tested on hand-made
messages. Attributes are those of <linux/netfilter/nfnetlink_queue.h>; integers are big endian.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from netfilterqueue._netlink cimport (
    Cursor, attributes_of, length_of, next_attribute, put_attribute, read_be16, read_be32,
    read_be64, type_of, value_of,
)
from netfilterqueue._uapi cimport (
    AF_UNSPEC, NFNETLINK_V0, NFNL_SUBSYS_QUEUE, NFQA_CFG_FLAGS, NFQA_CFG_MASK, NFQA_GID,
    NFQA_HWADDR, NFQA_IFINDEX_INDEV, NFQA_IFINDEX_OUTDEV, NFQA_IFINDEX_PHYSINDEV,
    NFQA_IFINDEX_PHYSOUTDEV, NFQA_MARK, NFQA_PACKET_HDR, NFQA_PAYLOAD, NFQA_TIMESTAMP, NFQA_UID,
    NFQA_VERDICT_HDR, NFQNL_CFG_CMD_BIND,
    NFQNL_CFG_CMD_UNBIND, NFQNL_MSG_CONFIG, NFQNL_MSG_PACKET, NFQNL_MSG_VERDICT,
    NFQNL_MSG_VERDICT_BATCH, NLM_F_ACK, NLM_F_REQUEST, htonl, htons, nfgenmsg,
    nfq_nlmsg_cfg_put_cmd, nfq_nlmsg_cfg_put_params, nfq_nlmsg_cfg_put_qmaxlen, nfq_nlmsg_put,
    nfqnl_msg_packet_hdr, nfqnl_msg_packet_hw, nfqnl_msg_packet_timestamp,
    nfqnl_msg_verdict_hdr, nlattr, nlmsghdr, ntohs,
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
    uint8_t hw_length            # bytes of hw_address that count; 0: none
    uint8_t hw_address[8]
    uint64_t seconds             # since the epoch; 0 with microseconds 0: no time stamp
    uint64_t microseconds
    uint32_t uid                 # of the local sender, where has_uid: 0 is root's
    uint32_t gid
    bint has_uid
    bint has_gid
    const char *payload          # borrowed from the message; NULL: none
    uint32_t payload_length


cdef inline bint is_packet(const nlmsghdr *message) noexcept nogil:
    return message.nlmsg_type == ((NFNL_SUBSYS_QUEUE << 8) | NFQNL_MSG_PACKET)


cdef inline bint decode_u32(const nlattr *attribute, uint32_t *field) noexcept nogil:
    if length_of(attribute) != sizeof(uint32_t):
        return False
    field[0] = read_be32(value_of(attribute))
    return True


cdef inline bint decode_owner(const nlattr *attribute, uint32_t *number,
                              bint *known) noexcept nogil:
    if not decode_u32(attribute, number):
        return False
    known[0] = True
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


cdef inline bint decode_payload(const nlattr *attribute, size_t length,
                                PacketFields *fields) noexcept nogil:
    fields.payload = value_of(attribute)
    fields.payload_length = <uint32_t> length
    return True


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
    if kind == NFQA_UID:
        return decode_owner(attribute, &fields.uid, &fields.has_uid)
    if kind == NFQA_GID:
        return decode_owner(attribute, &fields.gid, &fields.has_gid)
    return False


cdef inline bint decode_packet(const nlmsghdr *message, size_t length, PacketFields *fields,
                               uint64_t *skipped) noexcept nogil:
    """Decode a packet message of ``length`` bytes; False where it has no readable NFQA_PACKET_HDR,
    without which nothing can be decided.

    Attributes that are broken or unknown add to ``skipped``. Of one that is repeated the last
    counts, as everywhere in netlink. The payload comes last, so a message that did not fit into
    the reader's buffer still gives everything but the payload's end.
    """
    cdef Cursor cursor = attributes_of(message, length, sizeof(nfgenmsg))
    cdef const nlattr *attribute
    cdef bint identified = False
    memset(fields, 0, sizeof(PacketFields))
    if length < sizeof(nlmsghdr) + sizeof(nfgenmsg):
        return False
    fields.queue_num = read_be16(
        &(<const nfgenmsg *> (<const char *> message + sizeof(nlmsghdr))).res_id)
    while True:
        attribute = next_attribute(&cursor)
        if attribute is NULL:
            break
        if not decode_attribute(attribute, fields, &identified):
            skipped[0] += 1
    if cursor.left >= sizeof(nlattr):
        attribute = <const nlattr *> cursor.at
        if attribute.nla_len > cursor.left and type_of(attribute) == NFQA_PAYLOAD:
            decode_payload(attribute, cursor.left - sizeof(nlattr), fields)
            cursor.left = 0
    if cursor.left:
        skipped[0] += 1
    return identified


cdef inline nlmsghdr *begin_request(uint32_t *buffer, uint16_t queue_num) noexcept nogil:
    cdef nlmsghdr *message = nfq_nlmsg_put(<char *> buffer, NFQNL_MSG_CONFIG, queue_num)
    message.nlmsg_flags |= NLM_F_ACK
    return message


cdef inline void put_flags(nlmsghdr *message, uint32_t mask, uint32_t flags) noexcept nogil:
    mask = htonl(mask)
    flags = htonl(flags)
    put_attribute(message, NFQA_CFG_MASK, &mask, sizeof(mask))
    put_attribute(message, NFQA_CFG_FLAGS, &flags, sizeof(flags))


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


cdef struct Decision:
    uint32_t verdict
    uint32_t mark
    bint has_mark
    const char *payload          # NULL: the packet leaves as it came
    uint32_t payload_length


cdef inline size_t decision_size(const Decision *decision) noexcept nogil:
    """No less than what encode_verdict() writes, in bytes."""
    return VERDICT_ROOM + decision.payload_length


cdef inline size_t encode_verdict(char *buffer, uint16_t queue_num, uint32_t id,
                                  const Decision *decision, uint32_t sequence) noexcept nogil:
    """Write one verdict message and return its length in bytes, a multiple of 4.

    Written out, where the configuration above calls libnetfilter_queue: at a low packet rate, every
    page of another library that a verdict touches costs about as much as the whole message.
    """
    cdef nlmsghdr *message = <nlmsghdr *> buffer
    cdef nfgenmsg *family = <nfgenmsg *> (buffer + sizeof(nlmsghdr))
    cdef nfqnl_msg_verdict_hdr header
    cdef uint32_t mark
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
        mark = htonl(decision.mark)
        put_attribute(message, NFQA_MARK, &mark, sizeof(mark))
    if decision.payload is not NULL:
        put_attribute(message, NFQA_PAYLOAD, decision.payload, decision.payload_length)
    return message.nlmsg_len

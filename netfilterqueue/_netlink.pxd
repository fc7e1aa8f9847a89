"""Netlink's framing, checked: walk messages and attributes without leaving the buffer.

Both walks go through a ``Cursor``, the bytes not yet looked at. What claims to be longer than what
is left, or shorter than its own header, is not followed: the walk ends there and the bytes stay in
the cursor, so that the caller can tell a clean end (nothing left) from a broken one.

Framing is specified in RFC 3549 section 2.3 and in <linux/netlink.h>.
"""
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from netfilterqueue._uapi cimport (
    MSG_NOSIGNAL, NLA_F_NESTED, NLA_TYPE_MASK, NLMSG_NOOP, NLM_F_ACK, NLM_F_REQUEST, be64toh,
    htonl, htons, mnl_nlmsg_put_header, nlattr, nlmsghdr, ntohl, ntohs, send,
)


cdef struct Cursor:
    const char *at
    size_t left


cdef inline void advance(Cursor *cursor, size_t length) noexcept nogil:
    # Everything starts on a multiple of 4, but the last element need not be padded to one.
    cdef size_t step = (length + 3) & ~(<size_t> 3)
    if step > cursor.left:
        step = cursor.left
    cursor.at += step
    cursor.left -= step


cdef inline const nlmsghdr *next_message(Cursor *cursor, size_t *length) noexcept nogil:
    """The next message and how many of its bytes are there, or NULL.

    A message that did not fit into the reader's buffer claims more bytes than are there. It is
    not skipped: a queue's packet can be decided by its first attribute alone.
    """
    cdef const nlmsghdr *message = <const nlmsghdr *> cursor.at
    if cursor.left < sizeof(nlmsghdr) or message.nlmsg_len < sizeof(nlmsghdr):
        return NULL
    length[0] = message.nlmsg_len if message.nlmsg_len < cursor.left else cursor.left
    advance(cursor, length[0])
    return message


cdef inline Cursor attributes_of(const nlmsghdr *message, size_t length,
                                 size_t family_header) noexcept nogil:
    """A cursor over the attributes of a message of ``length`` bytes; empty where it is too short
    to have any. Every family's own header is a multiple of 4 bytes long."""
    cdef Cursor cursor
    cdef size_t offset = sizeof(nlmsghdr) + family_header
    if length < offset:
        offset = length
    cursor.at = <const char *> message + offset
    cursor.left = length - offset
    return cursor


cdef inline const nlattr *next_attribute(Cursor *cursor) noexcept nogil:
    """The next whole attribute, or NULL."""
    cdef const nlattr *attribute = <const nlattr *> cursor.at
    if (cursor.left < sizeof(nlattr) or attribute.nla_len < sizeof(nlattr)
            or attribute.nla_len > cursor.left):
        return NULL
    advance(cursor, attribute.nla_len)
    return attribute


cdef inline uint16_t type_of(const nlattr *attribute) noexcept nogil:
    return attribute.nla_type & <uint16_t> NLA_TYPE_MASK


cdef inline size_t length_of(const nlattr *attribute) noexcept nogil:
    return attribute.nla_len - sizeof(nlattr)


cdef inline const char *value_of(const nlattr *attribute) noexcept nogil:
    return <const char *> attribute + sizeof(nlattr)


cdef inline Cursor nested_in(const nlattr *attribute) noexcept nogil:
    """A cursor over the attributes that an attribute holds."""
    cdef Cursor cursor
    cursor.at = value_of(attribute)
    cursor.left = length_of(attribute)
    return cursor


# Building messages. The caller has made sure that there is room.

cdef inline void put_attribute(nlmsghdr *message, uint16_t kind, const void *value,
                               size_t length) noexcept nogil:
    """Append an attribute, and zeros up to a multiple of 4 bytes."""
    cdef char *at = <char *> message + message.nlmsg_len
    cdef nlattr *attribute = <nlattr *> at
    cdef size_t padding = -length & 3
    attribute.nla_type = kind
    attribute.nla_len = <uint16_t> (sizeof(nlattr) + length)
    memcpy(at + sizeof(nlattr), value, length)
    memset(at + sizeof(nlattr) + length, 0, padding)
    message.nlmsg_len += <uint32_t> (sizeof(nlattr) + length + padding)


cdef inline void put_be32(nlmsghdr *message, uint16_t kind, uint32_t value) noexcept nogil:
    value = htonl(value)
    put_attribute(message, kind, &value, sizeof(value))


cdef inline void put_be16(nlmsghdr *message, uint16_t kind, uint16_t value) noexcept nogil:
    value = htons(value)
    put_attribute(message, kind, &value, sizeof(value))


cdef inline nlattr *begin_nested(nlmsghdr *message, uint16_t kind) noexcept nogil:
    """Append an attribute that holds those appended from now until end_nested()."""
    cdef nlattr *attribute = <nlattr *> (<char *> message + message.nlmsg_len)
    attribute.nla_type = kind | <uint16_t> NLA_F_NESTED
    message.nlmsg_len += sizeof(nlattr)
    return attribute


cdef inline void end_nested(nlmsghdr *message, nlattr *attribute) noexcept nogil:
    attribute.nla_len = <uint16_t> (<char *> message + message.nlmsg_len - <char *> attribute)


cdef inline long send_noop(int socket) noexcept nogil:
    """Have the kernel send the socket an acknowledgement, and nothing else. -1 with errno."""
    cdef nlmsghdr message
    mnl_nlmsg_put_header(&message)
    message.nlmsg_type = NLMSG_NOOP
    message.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK
    return send(socket, &message, message.nlmsg_len, MSG_NOSIGNAL)


# Attribute values are aligned to 4 bytes only: memcpy is how C reads them at any alignment.

cdef inline uint16_t read_be16(const void *value) noexcept nogil:
    cdef uint16_t raw
    memcpy(&raw, value, sizeof(raw))
    return ntohs(raw)


cdef inline uint32_t read_be32(const void *value) noexcept nogil:
    cdef uint32_t raw
    memcpy(&raw, value, sizeof(raw))
    return ntohl(raw)


cdef inline uint64_t read_be64(const void *value) noexcept nogil:
    cdef uint64_t raw
    memcpy(&raw, value, sizeof(raw))
    return be64toh(raw)

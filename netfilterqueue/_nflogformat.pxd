"""The wire format of NFLOG: log messages in, configuration out.

Pure functions on memory, as for NFQUEUE. Attributes are those of
<linux/netfilter/nfnetlink_log.h>; integers are big endian.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memset

from netfilterqueue._netlink cimport (
    Cursor, attributes_of, length_of, next_attribute, put_attribute, put_be16, put_be32, type_of,
    value_of,
)
from netfilterqueue._uapi cimport (
    NFNETLINK_V0, NFNL_SUBSYS_ULOG, NFULA_CFG_CMD, NFULA_CFG_FLAGS, NFULA_CFG_MODE,
    NFULA_CFG_NLBUFSIZ, NFULA_CFG_QTHRESH, NFULA_CFG_TIMEOUT, NFULNL_CFG_CMD_BIND,
    NFULNL_CFG_CMD_UNBIND, NFULNL_MSG_CONFIG, NFULNL_MSG_PACKET, NLM_F_ACK, NLM_F_REQUEST, htonl,
    htons, mnl_nlmsg_put_extra_header, mnl_nlmsg_put_header, nfgenmsg, nfulnl_msg_config_cmd,
    nfulnl_msg_config_mode, nlattr, nlmsghdr,
)


cdef enum:
    # Words of 32 bits, more than any configuration message takes.
    REQUEST_WORDS = 32
    # What a log message holds besides the payload, hardware headers and conntrack included.
    ATTRIBUTE_ROOM = 4096


cdef struct GroupOptions:
    uint8_t copy_mode
    uint32_t copy_range          # bytes of payload; 0: all
    uint32_t nlbuf               # bytes that messages wait in, in the kernel; 0: its default
    uint32_t timeout             # for which they wait, in hundredths of a second
    uint32_t qthresh             # messages that wait at the most
    uint16_t flags               # NFULNL_CFG_F_…


cdef inline bint is_log(const nlmsghdr *message) noexcept nogil:
    return message.nlmsg_type == ((NFNL_SUBSYS_ULOG << 8) | NFULNL_MSG_PACKET)


cdef inline const nlattr *find_in(Cursor cursor, uint16_t kind) noexcept nogil:
    """The first attribute of a type, or NULL."""
    cdef const nlattr *attribute
    while True:
        attribute = next_attribute(&cursor)
        if attribute is NULL or type_of(attribute) == kind:
            return attribute


cdef inline const nlattr *find(const nlmsghdr *message, size_t length,
                               uint16_t kind) noexcept nogil:
    """The same in a message of ``length`` bytes. Messages are searched when somebody asks, and not
    decoded before: programs look at few of the attributes, and few of the messages."""
    return find_in(attributes_of(message, length, sizeof(nfgenmsg)), kind)


cdef inline const char *sized(const nlattr *attribute, size_t size) noexcept nogil:
    """The attribute's value, or NULL where it has not this size or there is no attribute."""
    if attribute is NULL or length_of(attribute) != size:
        return NULL
    return value_of(attribute)


cdef inline nlmsghdr *put_request(uint32_t *buffer, uint16_t group) noexcept nogil:
    cdef nlmsghdr *message = mnl_nlmsg_put_header(buffer)
    cdef nfgenmsg *family = <nfgenmsg *> mnl_nlmsg_put_extra_header(message, sizeof(nfgenmsg))
    message.nlmsg_type = (NFNL_SUBSYS_ULOG << 8) | NFULNL_MSG_CONFIG
    message.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK
    family.version = NFNETLINK_V0
    family.res_id = htons(group)
    return message


cdef inline void put_command(nlmsghdr *message, uint8_t command) noexcept nogil:
    cdef nfulnl_msg_config_cmd value
    value.command = command
    put_attribute(message, NFULA_CFG_CMD, &value, sizeof(value))


cdef inline nlmsghdr *encode_bind(uint32_t *buffer, uint16_t group,
                                  const GroupOptions *options) noexcept nogil:
    """Bind and configure in one message: no packet is logged by other rules than these."""
    cdef nlmsghdr *message = put_request(buffer, group)
    cdef nfulnl_msg_config_mode mode
    memset(&mode, 0, sizeof(mode))
    mode.copy_mode = options.copy_mode
    mode.copy_range = htonl(options.copy_range)
    put_command(message, NFULNL_CFG_CMD_BIND)
    put_attribute(message, NFULA_CFG_MODE, &mode, sizeof(mode))
    if options.nlbuf:
        put_be32(message, NFULA_CFG_NLBUFSIZ, options.nlbuf)
    put_be32(message, NFULA_CFG_TIMEOUT, options.timeout)
    put_be32(message, NFULA_CFG_QTHRESH, options.qthresh)
    put_be16(message, NFULA_CFG_FLAGS, options.flags)
    return message


cdef inline nlmsghdr *encode_unbind(uint32_t *buffer, uint16_t group) noexcept nogil:
    cdef nlmsghdr *message = put_request(buffer, group)
    put_command(message, NFULNL_CFG_CMD_UNBIND)
    return message

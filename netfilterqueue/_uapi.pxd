"""Declarations of the kernel's headers, POSIX, libmnl and libnetfilter_queue.

Declarations only: every number comes from the header that defines it. Those declared as ``cpdef``
are there for modules in Python, too: ``from netfilterqueue._uapi import NFQA_MARK``.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.types cimport pid_t


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len


cdef extern from "<sys/socket.h>" nogil:
    ctypedef unsigned int socklen_t
    ctypedef unsigned short sa_family_t

    struct sockaddr:
        pass

    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
        int msg_flags

    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len

    enum:
        AF_BRIDGE
        AF_NETLINK
        AF_UNSPEC
        SOCK_RAW
        SOCK_CLOEXEC
        SOL_SOCKET
        SO_DOMAIN
        SO_MEMINFO
        SO_PROTOCOL
        SO_RCVBUF
        SO_RCVBUFFORCE
        SO_TIMESTAMP
        MSG_DONTWAIT
        MSG_NOSIGNAL

    int socket(int domain, int type, int protocol)
    int bind(int fd, const sockaddr *address, socklen_t length)
    int connect(int fd, const sockaddr *address, socklen_t length)
    int getsockname(int fd, sockaddr *address, socklen_t *length)
    int getsockopt(int fd, int level, int name, void *value, socklen_t *length)
    int setsockopt(int fd, int level, int name, const void *value, socklen_t length)


cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The system calls of a packet's way, and not the C library's functions around them: those can
       be cancelled, which nobody wants here, and where a process has several threads they spend
       more instructions on that than the rest of a verdict takes. But on 32 bits the library knows
       which of several calls a kernel has: some lack those of their own for sockets, others those
       with times of 32 bits. */
    #if defined(SYS_sendto) && defined(SYS_recvfrom) && defined(SYS_recvmmsg) \
        && !defined(SYS_recvmmsg_time64)
    #define NETFILTERQUEUE_SEND(fd, data, length, flags) \
        syscall(SYS_sendto, fd, data, length, flags, NULL, 0)
    #define NETFILTERQUEUE_RECV(fd, buffer, length, flags) \
        syscall(SYS_recvfrom, fd, buffer, length, flags, NULL, NULL)
    #define NETFILTERQUEUE_RECVMMSG(fd, messages, count, flags) \
        syscall(SYS_recvmmsg, fd, messages, count, flags, NULL)
    #else
    #define NETFILTERQUEUE_SEND(fd, data, length, flags) send(fd, data, length, flags)
    #define NETFILTERQUEUE_RECV(fd, buffer, length, flags) recv(fd, buffer, length, flags)
    #define NETFILTERQUEUE_RECVMMSG(fd, messages, count, flags) \
        recvmmsg(fd, messages, count, flags, NULL)
    #endif
    """
    long send "NETFILTERQUEUE_SEND" (int fd, const void *data, size_t length, int flags) nogil
    long recv "NETFILTERQUEUE_RECV" (int fd, void *buffer, size_t length, int flags) nogil
    long recvmmsg "NETFILTERQUEUE_RECVMMSG" (int fd, mmsghdr *messages, unsigned int count,
                                             int flags) nogil


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents

    enum:
        POLLIN
    int poll(pollfd *descriptors, unsigned long count, int milliseconds)


cdef extern from "<fcntl.h>" nogil:
    enum:
        O_CLOEXEC
        O_RDONLY
        F_DUPFD_CLOEXEC
        F_GETFL
        O_NONBLOCK
    int fcntl(int fd, int command, ...)
    int open(const char *path, int flags, ...)


cdef extern from "<sched.h>" nogil:
    enum:
        CLONE_NEWNET
    int setns(int fd, int kind)


cdef extern from "<unistd.h>" nogil:
    int close(int fd)
    int pipe2(int *ends, int flags)
    ssize_t read(int fd, void *buffer, size_t length)
    ssize_t write(int fd, const void *data, size_t length)
    pid_t getpid()


cdef extern from "<time.h>" nogil:
    ctypedef long time_t

    struct clock_time "timespec":
        time_t tv_sec
        long tv_nsec

    enum:
        CLOCK_MONOTONIC
    int clock_gettime(int clock, clock_time *now)


cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum:
        SIG_SETMASK
    int sigfillset(sigset_t *signals)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_attr_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_mutexattr_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass

    int pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                       void *(*start)(void *) noexcept, void *argument)
    int pthread_join(pthread_t thread, void **result)
    int pthread_setname_np(pthread_t thread, const char *name)
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *before)
    int pthread_atfork(void (*prepare)() noexcept, void (*parent)() noexcept,
                       void (*child)() noexcept)
    int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_trylock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_condattr_init(pthread_condattr_t *attributes)
    int pthread_condattr_setclock(pthread_condattr_t *attributes, int clock)
    int pthread_condattr_destroy(pthread_condattr_t *attributes)
    int pthread_cond_init(pthread_cond_t *condition, const pthread_condattr_t *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_signal(pthread_cond_t *condition)
    int pthread_cond_broadcast(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                               const clock_time *deadline)


cdef extern from "<netinet/in.h>" nogil:
    enum:
        IPPROTO_AH
        IPPROTO_DSTOPTS
        IPPROTO_FRAGMENT
        IPPROTO_HOPOPTS
        IPPROTO_ICMP
        IPPROTO_ICMPV6
        IPPROTO_MH
        IPPROTO_ROUTING
        IPPROTO_TCP
        IPPROTO_UDP


cdef extern from "<netinet/ip.h>" nogil:
    struct iphdr:
        uint16_t tot_len

    enum:
        IP_MF
        IP_OFFMASK
        IPOPT_END
        IPOPT_LSRR
        IPOPT_NOOP
        IPOPT_SSRR


cdef extern from "<netinet/ip6.h>" nogil:
    struct ip6_hdr:
        uint16_t ip6_plen

    enum:
        IP6OPT_JUMBO
        IP6OPT_PAD1


cdef extern from "<netinet/tcp.h>" nogil:
    struct tcphdr:
        pass


cdef extern from "<netinet/udp.h>" nogil:
    struct udphdr:
        uint16_t len
        uint16_t check


cdef extern from "<netinet/ip_icmp.h>" nogil:
    struct icmphdr:
        uint16_t checksum


cdef extern from "<linux/netlink.h>" nogil:
    struct sockaddr_nl:
        sa_family_t nl_family
        uint32_t nl_pid
        uint32_t nl_groups

    struct nlmsghdr:
        uint32_t nlmsg_len
        uint16_t nlmsg_type
        uint16_t nlmsg_flags
        uint32_t nlmsg_seq
        uint32_t nlmsg_pid

    struct nlmsgerr:
        int error
        nlmsghdr msg

    struct nlattr:
        uint16_t nla_len
        uint16_t nla_type

    enum:
        NETLINK_NETFILTER
        NETLINK_NO_ENOBUFS
        NETLINK_CAP_ACK
        SOL_NETLINK
        NLM_F_REQUEST
        NLM_F_ACK
        NLMSG_NOOP
        NLMSG_ERROR
        NLMSG_MIN_TYPE

    cpdef enum:
        NLA_F_NESTED
        NLA_TYPE_MASK


cdef extern from "<linux/netfilter/nfnetlink.h>" nogil:
    struct nfgenmsg:
        uint8_t nfgen_family
        uint8_t version
        uint16_t res_id

    enum:
        NFNETLINK_V0
        NFNL_SUBSYS_ULOG

    cpdef enum:
        NFNL_SUBSYS_QUEUE


cdef extern from "<net/if.h>" nogil:
    enum:
        IFNAMSIZ

    struct ifreq:
        char ifr_name[IFNAMSIZ]
        int ifr_ifindex

    char *if_indextoname(unsigned int index, char *name)


cdef extern from "<linux/sock_diag.h>" nogil:
    enum:
        SK_MEMINFO_DROPS


cdef extern from "<linux/sockios.h>" nogil:
    enum:
        SIOCGSKNS


cdef extern from "<sys/ioctl.h>" nogil:
    enum:
        SIOCGIFNAME
    int ioctl(int fd, unsigned long request, ...)


cdef extern from "<linux/netfilter/nfnetlink_queue.h>" nogil:
    """
    // Newer than the headers of some systems; a macro of the same value hides no enumerator.
    #ifndef NFQA_PRIORITY
    #define NFQA_PRIORITY 21
    #endif
    #ifndef NFQA_CGROUP_CLASSID
    #define NFQA_CGROUP_CLASSID 22
    #endif
    """
    struct nfqnl_msg_packet_hdr:
        uint32_t packet_id
        uint16_t hw_protocol
        uint8_t hook

    struct nfqnl_msg_packet_hw:
        uint16_t hw_addrlen
        uint8_t hw_addr[8]

    struct nfqnl_msg_packet_timestamp:
        uint64_t sec
        uint64_t usec

    struct nfqnl_msg_verdict_hdr:
        uint32_t verdict
        uint32_t id

    enum:
        NFQNL_MSG_VERDICT
        NFQNL_MSG_VERDICT_BATCH
        NFQNL_MSG_CONFIG
        NFQNL_CFG_CMD_BIND
        NFQNL_CFG_CMD_UNBIND
        NFQNL_CFG_CMD_PF_BIND
        NFQNL_CFG_CMD_PF_UNBIND
        NFQA_CFG_MASK
        NFQA_CFG_FLAGS
        NFQA_UNSPEC
        NFQA_VERDICT_HDR
        NFQA_EXP

    cpdef enum:
        NFQNL_MSG_PACKET
        NFQA_CFG_F_FAIL_OPEN
        NFQA_CFG_F_CONNTRACK
        NFQA_CFG_F_GSO
        NFQA_CFG_F_UID_GID
        NFQA_CFG_F_SECCTX
        NFQA_PACKET_HDR
        NFQA_MARK
        NFQA_TIMESTAMP
        NFQA_IFINDEX_INDEV
        NFQA_IFINDEX_OUTDEV
        NFQA_IFINDEX_PHYSINDEV
        NFQA_IFINDEX_PHYSOUTDEV
        NFQA_HWADDR
        NFQA_PAYLOAD
        NFQA_CT
        NFQA_CT_INFO
        NFQA_CAP_LEN
        NFQA_SKB_INFO
        NFQA_UID
        NFQA_GID
        NFQA_SECCTX
        NFQA_VLAN
        NFQA_L2HDR
        NFQA_PRIORITY
        NFQA_CGROUP_CLASSID
        NFQA_VLAN_PROTO
        NFQA_VLAN_TCI
        NFQA_SKB_CSUMNOTREADY
        NFQA_SKB_GSO
        NFQA_SKB_CSUM_NOTVERIFIED


cdef extern from "<linux/netfilter/nfnetlink_log.h>" nogil:
    struct nfulnl_msg_packet_hdr:
        uint16_t hw_protocol
        uint8_t hook

    struct nfulnl_msg_packet_hw:
        uint16_t hw_addrlen
        uint8_t hw_addr[8]

    struct nfulnl_msg_packet_timestamp:
        uint64_t sec
        uint64_t usec

    struct nfulnl_msg_config_cmd:
        uint8_t command

    struct nfulnl_msg_config_mode:
        uint32_t copy_range
        uint8_t copy_mode

    enum:
        NFULNL_MSG_PACKET
        NFULNL_MSG_CONFIG
        NFULNL_CFG_CMD_BIND
        NFULNL_CFG_CMD_UNBIND
        NFULNL_CFG_F_SEQ
        NFULNL_CFG_F_SEQ_GLOBAL
        NFULNL_CFG_F_CONNTRACK
        NFULA_CFG_CMD
        NFULA_CFG_MODE
        NFULA_CFG_NLBUFSIZ
        NFULA_CFG_TIMEOUT
        NFULA_CFG_QTHRESH
        NFULA_CFG_FLAGS
        NFULA_PACKET_HDR
        NFULA_MARK
        NFULA_TIMESTAMP
        NFULA_IFINDEX_INDEV
        NFULA_IFINDEX_OUTDEV
        NFULA_IFINDEX_PHYSINDEV
        NFULA_IFINDEX_PHYSOUTDEV
        NFULA_HWADDR
        NFULA_PAYLOAD
        NFULA_PREFIX
        NFULA_UID
        NFULA_SEQ
        NFULA_SEQ_GLOBAL
        NFULA_GID
        NFULA_HWTYPE
        NFULA_HWHEADER
        NFULA_CT
        NFULA_CT_INFO
        NFULA_VLAN
        NFULA_VLAN_PROTO
        NFULA_VLAN_TCI


cdef extern from "<linux/netfilter.h>" nogil:
    enum:
        NF_DROP
        NF_ACCEPT
        NF_STOLEN
        NF_QUEUE
        NF_REPEAT
        NF_STOP
        NF_VERDICT_MASK
        NF_VERDICT_QBITS
        NF_VERDICT_FLAG_QUEUE_BYPASS


cdef extern from "<linux/netfilter/nfnetlink_conntrack.h>" nogil:
    cpdef enum:
        CTA_TUPLE_ORIG
        CTA_TUPLE_REPLY
        CTA_STATUS
        CTA_TIMEOUT
        CTA_MARK
        CTA_ID
        CTA_ZONE
        CTA_LABELS
        CTA_TUPLE_IP
        CTA_TUPLE_PROTO
        CTA_TUPLE_ZONE
        CTA_IP_V4_SRC
        CTA_IP_V4_DST
        CTA_IP_V6_SRC
        CTA_IP_V6_DST
        CTA_PROTO_NUM
        CTA_PROTO_SRC_PORT
        CTA_PROTO_DST_PORT
        CTA_PROTO_ICMP_ID
        CTA_PROTO_ICMP_TYPE
        CTA_PROTO_ICMP_CODE
        CTA_PROTO_ICMPV6_ID
        CTA_PROTO_ICMPV6_TYPE
        CTA_PROTO_ICMPV6_CODE


cdef extern from "<arpa/inet.h>" nogil:
    uint16_t htons(uint16_t value)
    uint32_t htonl(uint32_t value)
    uint16_t ntohs(uint16_t value)
    uint32_t ntohl(uint32_t value)


cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t value)


cdef extern from "<libmnl/libmnl.h>" nogil:
    nlmsghdr *mnl_nlmsg_put_header(void *buffer)
    void *mnl_nlmsg_put_extra_header(nlmsghdr *message, size_t size)


cdef extern from "<libnetfilter_queue/libnetfilter_queue.h>" nogil:
    nlmsghdr *nfq_nlmsg_put(char *buffer, int type, uint32_t queue_num)
    void nfq_nlmsg_cfg_put_cmd(nlmsghdr *message, uint16_t family, uint8_t command)
    void nfq_nlmsg_cfg_put_params(nlmsghdr *message, uint8_t mode, int range)
    void nfq_nlmsg_cfg_put_qmaxlen(nlmsghdr *message, uint32_t max_len)


cdef extern from "<libnetfilter_queue/libnetfilter_queue_ipv4.h>" nogil:
    void nfq_ip_set_checksum(iphdr *header)


cdef extern from "<libnetfilter_queue/libnetfilter_queue_tcp.h>" nogil:
    void nfq_tcp_compute_checksum_ipv4(tcphdr *header, iphdr *packet)
    void nfq_tcp_compute_checksum_ipv6(tcphdr *header, ip6_hdr *packet)


cdef extern from "<libnetfilter_queue/libnetfilter_queue_udp.h>" nogil:
    void nfq_udp_compute_checksum_ipv4(udphdr *header, iphdr *packet)
    void nfq_udp_compute_checksum_ipv6(udphdr *header, ip6_hdr *packet)

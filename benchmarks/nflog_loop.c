/*
 * The limit: what the kernel allows a program that reads up to 32 datagrams with one recvmmsg(),
 * and looks up the number of each message in them, by which it knows whether one is missing.
 *
 *     nflog_loop iterate GROUP MESSAGES THRESHOLD RECEIVE_BUFFER
 *
 * The command line and the dialogue on standard input and output are those of nflog_program.py.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include <libmnl/libmnl.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter/nfnetlink_log.h>

#define BATCH 32
/* What the kernel makes of its default buffer, a page. Not a power of two: slots must not share
 * cache sets. */
#define SLOT (8192 + 192)
/* As in nflog_program.py, in hundredths of a second. */
#define TIMEOUT 1

static char slab[BATCH][SLOT];

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "nflog_loop: %s: %s\n", what, strerror(errno));
    exit(EXIT_FAILURE);
}

static uint64_t number(const char *text, uint64_t most)
{
    char *end;

    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno || end == text || *end || value > most) {
        errno = EINVAL;
        fail(text);
    }
    return value;
}

static void bind_group(struct mnl_socket *netlink, uint16_t group, uint32_t threshold)
{
    char buffer[1024];
    struct nfulnl_msg_config_cmd command = {.command = NFULNL_CFG_CMD_BIND};
    struct nfulnl_msg_config_mode mode = {.copy_mode = NFULNL_COPY_PACKET};
    struct nlmsghdr *message = mnl_nlmsg_put_header(buffer);
    struct nfgenmsg *generic = mnl_nlmsg_put_extra_header(message, sizeof(*generic));

    message->nlmsg_type = NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG;
    message->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
    generic->version = NFNETLINK_V0;
    generic->res_id = htons(group);
    mnl_attr_put(message, NFULA_CFG_CMD, sizeof(command), &command);
    mnl_attr_put(message, NFULA_CFG_MODE, sizeof(mode), &mode);
    mnl_attr_put_u32(message, NFULA_CFG_TIMEOUT, htonl(TIMEOUT));
    mnl_attr_put_u32(message, NFULA_CFG_QTHRESH, htonl(threshold));
    mnl_attr_put_u16(message, NFULA_CFG_FLAGS, htons(NFULNL_CFG_F_SEQ));
    if (mnl_socket_sendto(netlink, message, message->nlmsg_len) < 0)
        fail("bind: send");

    ssize_t length = mnl_socket_recvfrom(netlink, buffer, sizeof(buffer));
    if (length < 0 || mnl_cb_run(buffer, length, 0, mnl_socket_get_portid(netlink), NULL, NULL) < 0)
        fail("bind");
}

static int open_group(uint16_t group, uint32_t threshold, int receive_buffer)
{
    struct mnl_socket *netlink = mnl_socket_open(NETLINK_NETFILTER);

    if (!netlink || mnl_socket_bind(netlink, 0, MNL_SOCKET_AUTOPID) < 0)
        fail("netlink socket");

    int fd = mnl_socket_get_fd(netlink);
    /* Only root of the machine may go over net.core.rmem_max. */
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &receive_buffer, sizeof(receive_buffer)) < 0 &&
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer)) < 0)
        fail("receive buffer");
    bind_group(netlink, group, threshold);
    return fd;
}

/* Written out: libmnl's mnl_attr_for_each() is three calls into the library for each attribute. */
static uint32_t sequence_number(const struct nlmsghdr *message)
{
    const char *end = (const char *)message + message->nlmsg_len;
    const char *at = (const char *)message + NLMSG_HDRLEN + NLMSG_ALIGN(sizeof(struct nfgenmsg));

    while (end - at >= NLA_HDRLEN) {
        const struct nlattr *attribute = (const struct nlattr *)at;
        if (attribute->nla_len < NLA_HDRLEN || attribute->nla_len > end - at)
            break;
        if ((attribute->nla_type & NLA_TYPE_MASK) == NFULA_SEQ)
            return ntohl(*(const uint32_t *)(at + NLA_HDRLEN));
        at += NLA_ALIGN(attribute->nla_len);
    }
    errno = EBADMSG;
    fail("message without a number");
}

/* Takes the messages of a datagram; returns how many there were. */
static uint64_t take(const char *datagram, int length, uint32_t *next)
{
    const struct nlmsghdr *message = (const struct nlmsghdr *)datagram;
    uint64_t count = 0;

    for (; mnl_nlmsg_ok(message, length); message = mnl_nlmsg_next(message, &length)) {
        if (message->nlmsg_type != (NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET))
            continue;
        if (sequence_number(message) != (*next)++) {
            errno = ENOBUFS;
            fail("a message is missing");
        }
        count++;
    }
    return count;
}

static uint64_t drain(int fd, struct mmsghdr *headers, uint64_t wanted, uint32_t *next)
{
    uint64_t taken = 0;

    while (taken < wanted) {
        int count = recvmmsg(fd, headers, BATCH, MSG_WAITFORONE, NULL);
        if (count < 0)
            fail("recvmmsg");
        for (int i = 0; i < count; i++)
            taken += take(slab[i], headers[i].msg_len, next);
    }
    return taken;
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    struct mmsghdr headers[BATCH];
    struct iovec slots[BATCH];
    uint32_t next = 0;

    if (argc != 6 || strcmp(argv[1], "iterate")) {
        fputs("usage: nflog_loop iterate GROUP MESSAGES THRESHOLD RECEIVE_BUFFER\n", stderr);
        return 2;
    }
    for (int i = 0; i < BATCH; i++) {
        slots[i] = (struct iovec){.iov_base = slab[i], .iov_len = SLOT};
        headers[i].msg_hdr = (struct msghdr){.msg_iov = &slots[i], .msg_iovlen = 1};
    }
    uint64_t messages = number(argv[3], UINT32_MAX);
    int fd = open_group(number(argv[2], UINT16_MAX), number(argv[4], UINT32_MAX),
                        number(argv[5], INT32_MAX));

    puts("ready");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof(line), stdin)) {
        double start = now();
        uint64_t taken = drain(fd, headers, messages, &next);
        printf("%.9f %llu\n", now() - start, (unsigned long long)taken);
        fflush(stdout);
    }
    return EXIT_SUCCESS;
}

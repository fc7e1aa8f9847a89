/* What the loops in C share: a netlink socket, a slab of slots to read into, a clock. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#include <libmnl/libmnl.h>
#include <linux/netfilter/nfnetlink.h>

#define BATCH 32

/* What recvmmsg() reads into. */
struct slots {
    struct mmsghdr headers[BATCH];
    struct iovec vectors[BATCH];
};

static void point_slots(struct slots *slots, char *slab, size_t size)
{
    memset(slots, 0, sizeof(*slots));
    for (int i = 0; i < BATCH; i++) {
        slots->vectors[i] = (struct iovec){.iov_base = slab + i * size, .iov_len = size};
        slots->headers[i].msg_hdr = (struct msghdr){.msg_iov = &slots->vectors[i], .msg_iovlen = 1};
    }
}

static uint64_t number(const char *text, uint64_t most)
{
    char *end;

    errno = 0;
    unsigned long value = strtoul(text, &end, 10);
    if (errno || end == text || *end || value > most)
        errx(EXIT_FAILURE, "%s: no number up to %llu", text, (unsigned long long)most);
    return value;
}

static struct mnl_socket *open_netlink(int receive_buffer)
{
    struct mnl_socket *netlink = mnl_socket_open(NETLINK_NETFILTER);

    if (!netlink || mnl_socket_bind(netlink, 0, MNL_SOCKET_AUTOPID) < 0)
        err(EXIT_FAILURE, "netlink socket");

    int fd = mnl_socket_get_fd(netlink);
    /* Only root of the machine may go over net.core.rmem_max. */
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &receive_buffer, sizeof(receive_buffer)) < 0 &&
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer)) < 0)
        err(EXIT_FAILURE, "receive buffer");
    return netlink;
}

/* Begins a message to a queue or to a log group: its subsystem, and which of them. */
static struct nlmsghdr *put_header(void *at, uint16_t type, uint16_t flags, uint16_t which)
{
    struct nlmsghdr *message = mnl_nlmsg_put_header(at);
    struct nfgenmsg *generic = mnl_nlmsg_put_extra_header(message, sizeof(*generic));

    message->nlmsg_type = type;
    message->nlmsg_flags = NLM_F_REQUEST | flags;
    generic->version = NFNETLINK_V0;
    generic->res_id = htons(which);
    return message;
}

/* Sends a message that asks for an acknowledgement, and takes that. */
static void request(struct mnl_socket *netlink, const struct nlmsghdr *message)
{
    char answer[1024];

    if (mnl_socket_sendto(netlink, message, message->nlmsg_len) < 0)
        err(EXIT_FAILURE, "bind: send");

    ssize_t length = mnl_socket_recvfrom(netlink, answer, sizeof(answer));
    if (length < 0 || mnl_cb_run(answer, length, 0, mnl_socket_get_portid(netlink), NULL, NULL) < 0)
        err(EXIT_FAILURE, "bind");
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

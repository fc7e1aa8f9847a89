/*
 * The limit: what the kernel allows a program that reads up to 32 datagrams with one recvmmsg(),
 * and looks up the number of each message in them, by which it knows whether one is missing.
 *
 *     nflog_loop iterate GROUP MESSAGES THRESHOLD RECEIVE_BUFFER
 *
 * The command line and the dialogue on standard input and output are those of nflog_program.py.
 */
#include "loop.h"

#include <linux/netfilter/nfnetlink_log.h>

/* What the kernel makes of its default buffer, a page. Not a power of two: slots must not share
 * cache sets. */
#define SLOT (8192 + 192)
/* As in nflog_program.py, in hundredths of a second. */
#define TIMEOUT 1
#define CONFIG (NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_CONFIG)
#define PACKET (NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_PACKET)

static char slab[BATCH][SLOT];

static int open_group(uint16_t group, uint32_t threshold, int receive_buffer)
{
    char buffer[1024];
    struct mnl_socket *netlink = open_netlink(receive_buffer);
    struct nfulnl_msg_config_cmd command = {.command = NFULNL_CFG_CMD_BIND};
    struct nfulnl_msg_config_mode mode = {.copy_mode = NFULNL_COPY_PACKET};
    struct nlmsghdr *message = put_header(buffer, CONFIG, NLM_F_ACK, group);

    mnl_attr_put(message, NFULA_CFG_CMD, sizeof(command), &command);
    mnl_attr_put(message, NFULA_CFG_MODE, sizeof(mode), &mode);
    mnl_attr_put_u32(message, NFULA_CFG_TIMEOUT, htonl(TIMEOUT));
    mnl_attr_put_u32(message, NFULA_CFG_QTHRESH, htonl(threshold));
    mnl_attr_put_u16(message, NFULA_CFG_FLAGS, htons(NFULNL_CFG_F_SEQ));
    request(netlink, message);
    return mnl_socket_get_fd(netlink);
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
    errx(EXIT_FAILURE, "message without a number");
}

/* Takes the messages of a datagram; returns how many there were. */
static uint64_t take(const char *datagram, int length, uint32_t *next)
{
    const struct nlmsghdr *message = (const struct nlmsghdr *)datagram;
    uint64_t count = 0;

    for (; mnl_nlmsg_ok(message, length); message = mnl_nlmsg_next(message, &length)) {
        if (message->nlmsg_type != PACKET)
            continue;
        if (sequence_number(message) != (*next)++)
            errx(EXIT_FAILURE, "a message is missing");
        count++;
    }
    return count;
}

static uint64_t drain(int fd, struct slots *slots, uint64_t wanted, uint32_t *next)
{
    uint64_t taken = 0;

    while (taken < wanted) {
        int count = recvmmsg(fd, slots->headers, BATCH, MSG_WAITFORONE, NULL);
        if (count < 0)
            err(EXIT_FAILURE, "recvmmsg");
        for (int i = 0; i < count; i++)
            taken += take(slab[i], slots->headers[i].msg_len, next);
    }
    return taken;
}

int main(int argc, char **argv)
{
    struct slots slots;
    uint32_t next = 0;

    if (argc != 6 || strcmp(argv[1], "iterate")) {
        fputs("usage: nflog_loop iterate GROUP MESSAGES THRESHOLD RECEIVE_BUFFER\n", stderr);
        return 2;
    }
    point_slots(&slots, slab[0], SLOT);
    uint64_t messages = number(argv[3], UINT32_MAX);
    int fd = open_group(number(argv[2], UINT16_MAX), number(argv[4], UINT32_MAX),
                        number(argv[5], INT32_MAX));

    puts("ready");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof(line), stdin)) {
        double start = now();
        uint64_t taken = drain(fd, &slots, messages, &next);
        printf("%.9f %llu\n", now() - start, (unsigned long long)taken);
        fflush(stdout);
    }
    return EXIT_SUCCESS;
}

/*
 * The limit: what the kernel allows a program that reads up to 32 packets with one recvmmsg(),
 * gives each the same verdict and sends the 32 verdicts with one send().
 *
 *     drain_loop drain|serve drop|accept|mangle QUEUE MAX_LEN RECEIVE_BUFFER [gso]
 *
 * The command line and the dialogue on standard input and output are those of classic_api.py.
 */
#include "loop.h"

#include <linux/netfilter.h>
#include <linux/netfilter/nfnetlink_queue.h>

/* The largest packet and its attributes. Not a power of two: slots must not share cache sets. */
#define SLOT (65536 + 1024 + 192)
#define CONFIG (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_CONFIG)
#define VERDICT (NFNL_SUBSYS_QUEUE << 8 | NFQNL_MSG_VERDICT)
#define VERDICT_SIZE                                                                             \
    (MNL_NLMSG_HDRLEN + MNL_ALIGN(sizeof(struct nfgenmsg)) + MNL_ATTR_HDRLEN +                   \
     MNL_ALIGN(sizeof(struct nfqnl_msg_verdict_hdr)))

/* Of IPv4 and UDP. */
#define HEADERS 28

struct loop {
    int fd;
    uint16_t queue;
    uint32_t verdict;
    bool mangle;
    struct slots slots;
};

static char slab[BATCH][SLOT];

/* Which of the words it is. */
static int choice(const char *word, const char *const words[])
{
    for (int i = 0; words[i]; i++)
        if (!strcmp(word, words[i]))
            return i;
    errx(EXIT_FAILURE, "%s: unknown", word);
}

static int open_queue(uint16_t queue, uint32_t max_len, int receive_buffer, uint32_t flags)
{
    char buffer[1024];
    struct mnl_socket *netlink = open_netlink(receive_buffer);
    struct nfqnl_msg_config_cmd command = {.command = NFQNL_CFG_CMD_BIND};
    struct nfqnl_msg_config_params params = {.copy_mode = NFQNL_COPY_PACKET};
    struct nlmsghdr *message = put_header(buffer, CONFIG, NLM_F_ACK, queue);

    mnl_attr_put(message, NFQA_CFG_CMD, sizeof(command), &command);
    mnl_attr_put(message, NFQA_CFG_PARAMS, sizeof(params), &params);
    mnl_attr_put_u32(message, NFQA_CFG_QUEUE_MAXLEN, htonl(max_len));
    mnl_attr_put_u32(message, NFQA_CFG_MASK, htonl(flags));
    mnl_attr_put_u32(message, NFQA_CFG_FLAGS, htonl(flags));
    request(netlink, message);
    return mnl_socket_get_fd(netlink);
}

static const struct nlattr *attribute_of(const struct nlmsghdr *packet, uint16_t type)
{
    const struct nlattr *attribute;

    mnl_attr_for_each(attribute, packet, sizeof(struct nfgenmsg))
        if (mnl_attr_get_type(attribute) == type)
            return attribute;
    errx(EXIT_FAILURE, "packet without an id or a payload");
}

static void *put_verdict(const struct loop *loop, void *at, const struct nlmsghdr *packet)
{
    struct nlmsghdr *message = put_header(at, VERDICT, 0, loop->queue);
    const struct nfqnl_msg_packet_hdr *header =
        mnl_attr_get_payload(attribute_of(packet, NFQA_PACKET_HDR));
    /* The id is big endian here and there. */
    struct nfqnl_msg_verdict_hdr verdict = {.verdict = loop->verdict, .id = header->packet_id};

    mnl_attr_put(message, NFQA_VERDICT_HDR, sizeof(verdict), &verdict);
    if (loop->mangle) {
        const struct nlattr *payload = attribute_of(packet, NFQA_PAYLOAD);
        uint16_t length = mnl_attr_get_payload_len(payload);
        char *copy = (char *)mnl_nlmsg_get_payload_tail(message) + MNL_ATTR_HDRLEN;

        mnl_attr_put(message, NFQA_PAYLOAD, length, mnl_attr_get_payload(payload));
        if (length > HEADERS)
            memset(copy + HEADERS, 'x', length - HEADERS);
    }
    return mnl_nlmsg_get_payload_tail(message);
}

/* Decides packets until none is pending (MSG_DONTWAIT), or for ever. */
static void run(struct loop *loop, int flags)
{
    static char verdicts[BATCH * (VERDICT_SIZE + SLOT)];

    for (;;) {
        int count = recvmmsg(loop->fd, loop->slots.headers, BATCH, MSG_WAITFORONE | flags, NULL);
        if (count < 0) {
            if (errno == EAGAIN)
                return;
            err(EXIT_FAILURE, "recvmmsg");
        }
        char *end = verdicts;
        for (int i = 0; i < count; i++)
            end = put_verdict(loop, end, (struct nlmsghdr *)slab[i]);
        if (send(loop->fd, verdicts, end - verdicts, 0) < 0)
            err(EXIT_FAILURE, "send");
    }
}

int main(int argc, char **argv)
{
    if (argc != 6 && argc != 7) {
        fputs("usage: drain_loop drain|serve drop|accept|mangle QUEUE MAX_LEN RECEIVE_BUFFER [gso]\n",
              stderr);
        return 2;
    }
    int verdict = choice(argv[2], (const char *[]){"drop", "accept", "mangle", NULL});
    struct loop loop = {
        .queue = number(argv[3], UINT16_MAX),
        .verdict = htonl(verdict ? NF_ACCEPT : NF_DROP),
        .mangle = verdict == 2,
    };
    bool serve = choice(argv[1], (const char *[]){"drain", "serve", NULL});
    if (argc == 7)
        choice(argv[6], (const char *[]){"gso", NULL});

    point_slots(&loop.slots, slab[0], SLOT);
    loop.fd = open_queue(loop.queue, number(argv[4], UINT32_MAX), number(argv[5], INT32_MAX),
                         argc == 7 ? NFQA_CFG_F_GSO : 0);

    puts("ready");
    fflush(stdout);
    if (serve)
        run(&loop, 0);
    char line[64];
    while (fgets(line, sizeof(line), stdin)) {
        double start = now();
        run(&loop, MSG_DONTWAIT);
        printf("%.9f\n", now() - start);
        fflush(stdout);
    }
    return EXIT_SUCCESS;
}

"""A queue as a class: the packets are counted by protocol, and accepted."""

import argparse
import contextlib
from collections import Counter

from netfilterqueue import PROTOCOLS, NetfilterQueue, Verdict

ETHERTYPE_IPV4 = 0x0800


class CountingQueue(NetfilterQueue):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def handle(self, packet):
        header = memoryview(packet)
        protocol = header[9] if packet.hw_protocol == ETHERTYPE_IPV4 else header[6]
        self.counts[PROTOCOLS.get(protocol, str(protocol))] += 1
        return Verdict.ACCEPT


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1)
    arguments = parser.parse_args()

    with CountingQueue() as queue:
        queue.bind(arguments.queue_num)
        with contextlib.suppress(KeyboardInterrupt):
            queue.run()
        for protocol, count in queue.counts.most_common():
            print(f"{count:8} {protocol}")


if __name__ == "__main__":
    main()

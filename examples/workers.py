"""A process for each of several queues, on a CPU of its own, restarted when it crashes.

For a rule such as -j NFQUEUE --queue-balance 1:4, or --queue-balance 1:4 --queue-cpu-fanout.
"""

import argparse
import logging

from netfilterqueue.workers import serve


def print_and_accept(packet):
    print(f"queue {packet.queue_num}: {packet}")
    packet.accept()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1, help="of the first queue")
    parser.add_argument("--count", type=int, default=4, help="how many queues")
    arguments = parser.parse_args()

    logging.basicConfig(level=logging.INFO)
    first = arguments.queue_num
    print(serve(print_and_accept, range(first, first + arguments.count)))


if __name__ == "__main__":
    main()

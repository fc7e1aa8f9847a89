"""Run a queue on trio, which waits for it while other tasks work."""

import argparse
import contextlib

import trio

from netfilterqueue import NetfilterQueue


def print_and_accept(packet):
    print(packet)
    packet.accept()


async def run_queue(queue_num):
    with NetfilterQueue() as queue:
        queue.bind(queue_num, print_and_accept)
        while True:
            await trio.lowlevel.wait_readable(queue.fileno())
            queue.run(block=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1)
    arguments = parser.parse_args()

    with contextlib.suppress(KeyboardInterrupt):
        trio.run(run_queue, arguments.queue_num)


if __name__ == "__main__":
    main()

"""Decide packets in a pool of threads, so that a slow decision holds back no other packet."""

import argparse
import concurrent.futures
import contextlib
import time
import traceback

from netfilterqueue import NetfilterQueue


def decide(packet, delay):
    time.sleep(delay)  # stands for whatever is slow: a database, another host
    print(packet)
    packet.accept()


def run_queue(queue_num, workers, delay):
    # In this order: the pool ends first, when all that it was given is decided.
    with NetfilterQueue() as queue, concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def drop_if_failed(packet, future):
            # A packet that nobody decides stays in the queue and counts against max_len.
            if future.exception() is not None:
                traceback.print_exception(None, future.exception(), None)
                if packet.verdict is None:
                    packet.drop()

        queue.bind(queue_num)
        for packet in queue:
            future = pool.submit(decide, packet, delay)
            future.add_done_callback(lambda future, packet=packet: drop_if_failed(packet, future))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8, help="threads (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.1, help="seconds (default: %(default)s)")
    arguments = parser.parse_args()

    with contextlib.suppress(KeyboardInterrupt):
        run_queue(arguments.queue_num, arguments.workers, arguments.delay)


if __name__ == "__main__":
    main()

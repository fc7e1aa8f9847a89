"""Several queues, each with an object and a thread of its own.

A rule such as ``-j NFQUEUE --queue-balance 1:3`` spreads the connections over them.
"""

import argparse
import contextlib
import threading

from netfilterqueue import NetfilterQueue


def print_and_accept(packet):
    print(f"queue {packet.queue_num}: {packet}")
    packet.accept()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, nargs="+", default=[1, 2, 3])
    arguments = parser.parse_args()

    with contextlib.ExitStack() as stack:
        queues = []
        for queue_num in arguments.queue_num:
            queue = stack.enter_context(NetfilterQueue())
            queue.bind(queue_num, print_and_accept)
            queues.append(queue)

        threads = [threading.Thread(target=queue.run) for queue in queues]
        for thread in threads:
            thread.start()
        try:
            threading.Event().wait()  # until the program is interrupted
        except KeyboardInterrupt:
            for queue in queues:
                queue.stop()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()

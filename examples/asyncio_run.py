"""Hold every packet back for a while, each in an asyncio task of its own."""

import argparse
import asyncio
import contextlib

from netfilterqueue import NetfilterQueue


async def accept_later(packet, delay):
    await asyncio.sleep(delay)
    packet.accept()


async def run_queue(queue_num, delay):
    loop = asyncio.get_running_loop()
    tasks = set()

    def start_task(packet):
        print(packet)
        task = loop.create_task(accept_later(packet, delay))
        # The loop itself keeps no more than a weak reference to a task.
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    with NetfilterQueue() as queue:
        queue.bind(queue_num, start_task)
        loop.add_reader(queue.fileno(), queue.run, False)
        try:
            await asyncio.Event().wait()  # until the program is interrupted
        finally:
            loop.remove_reader(queue.fileno())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds (default: %(default)s)")
    arguments = parser.parse_args()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run_queue(arguments.queue_num, arguments.delay))


if __name__ == "__main__":
    main()

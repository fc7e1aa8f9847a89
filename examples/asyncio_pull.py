"""Pull packets on asyncio, and decide each in a task of its own."""

import argparse
import asyncio
import contextlib

from netfilterqueue import NetfilterQueue


async def decide(packet, delay):
    await asyncio.sleep(delay)  # stands for whatever takes time: a lookup, another host
    print(packet)
    packet.accept()


async def run_queue(queue_num, delay):
    tasks = set()
    with NetfilterQueue() as queue:
        queue.bind(queue_num)
        async for packet in queue:
            task = asyncio.create_task(decide(packet, delay))
            # The loop itself keeps no more than a weak reference to a task.
            tasks.add(task)
            task.add_done_callback(tasks.discard)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.1, help="seconds (default: %(default)s)")
    arguments = parser.parse_args()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run_queue(arguments.queue_num, arguments.delay))


if __name__ == "__main__":
    main()

"""A contestant: this library, with the kind of loop that the first argument names.

    python loop_program.py KIND drain|serve|stop drop|accept QUEUE MAX_LEN RECEIVE_BUFFER

Binds the queue and prints "ready". ``drain``: for each line on standard input, decides MAX_LEN
packets, which are pending, and prints the seconds from the first read to the last verdict.
``serve``: decides packets until it is killed. ``stop``: for each line on standard input, stops the
loop, which another thread runs, again and again, and prints how many seconds each took.
"""

from __future__ import annotations

import asyncio
import itertools
import queue as queues
import random
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable

from netfilterqueue import NetfilterQueue, Packet

STOPS = 300
LONGEST_RUN = 0.003  # seconds from a start to a stop
FOREVER = sys.maxsize

Decide = Callable[[Packet], None]


def drop(packet: Packet) -> None:
    packet.drop()


def accept(packet: Packet) -> None:
    packet.accept()


# Each returns when the queue is stopped, or after so many packets.


def callback(queue: NetfilterQueue, decide: Decide, count: int) -> None:
    queue.run(count=count)


def through_socket(queue: NetfilterQueue, decide: Decide, count: int) -> None:
    with socket.fromfd(queue.fileno(), socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        sock.setblocking(count == FOREVER)
        queue.run_socket(sock)


def read(queue: NetfilterQueue, decide: Decide, count: int) -> None:
    while count > 0 and (packets := queue.read()):
        count -= len(packets)
        for packet in packets:
            decide(packet)


def iterate(queue: NetfilterQueue, decide: Decide, count: int) -> None:
    for packet in itertools.islice(queue, count):
        decide(packet)


def iterate_on_asyncio(queue: NetfilterQueue, decide: Decide, count: int) -> None:
    async def main() -> None:
        left = count
        async for packet in queue:
            decide(packet)
            left -= 1
            if not left:
                break

    LOOP.run_until_complete(main())


def read_on_asyncio(queue: NetfilterQueue, decide: Decide, count: int) -> None:
    async def main() -> None:
        left = count
        while left > 0 and (packets := await queue.aread()):
            left -= len(packets)
            for packet in packets:
                decide(packet)

    LOOP.run_until_complete(main())


LOOP = asyncio.new_event_loop()
KINDS = {
    "callback": callback,
    "run_socket": through_socket,
    "read": read,
    "for": iterate,
    "async_for": iterate_on_asyncio,
    "aread": read_on_asyncio,
}


def time_stops(start: Callable[[], None], queue: NetfilterQueue) -> list[float]:
    returned: queues.SimpleQueue[float] = queues.SimpleQueue()
    go_on: queues.SimpleQueue[bool] = queues.SimpleQueue()

    def start_again_and_again() -> None:
        while go_on.get():
            start()
            returned.put(time.perf_counter())

    thread = threading.Thread(target=start_again_and_again)
    thread.start()
    took = []
    for _ in range(STOPS):
        go_on.put(True)
        time.sleep(random.uniform(LONGEST_RUN / 3, LONGEST_RUN))
        stopped = time.perf_counter()
        queue.stop()
        took.append(returned.get() - stopped)
    go_on.put(False)
    thread.join()
    return took


def main() -> None:
    kind, job, verdict, queue_num, max_len, receive_buffer = sys.argv[1:]
    loop = KINDS[kind]
    decide = {"drop": drop, "accept": accept}[verdict]
    warnings.simplefilter("ignore", RuntimeWarning)  # the runner has sized the rounds by it
    queue = NetfilterQueue()
    queue.bind(
        int(queue_num),
        decide if loop in (callback, through_socket) else None,
        max_len=int(max_len),
        sock_len=int(receive_buffer),
    )
    print("ready", flush=True)
    if job == "serve":
        loop(queue, decide, FOREVER)
    for _ in sys.stdin:
        if job == "stop":
            print(*time_stops(lambda: loop(queue, decide, FOREVER), queue), flush=True)
        else:
            start = time.perf_counter()
            loop(queue, decide, int(max_len))
            print(f"{time.perf_counter() - start:.9f}", flush=True)


if __name__ == "__main__":
    main()

"""A contestant: the classic API, so that one program measures every library that offers it.

    python classic_api.py drain|serve drop|accept|mangle QUEUE MAX_LEN RECEIVE_BUFFER [FLAG]

Binds the queue, with a flag that not every library has, and prints "ready". ``drain``: for each
line on standard input, decides what is pending and prints the seconds from the first read to the
last verdict. ``serve``: decides packets until it is killed. ``mangle``: accepts UDP packets without
a checksum, all bytes of their data replaced.
"""

from __future__ import annotations

import sys
import time
import warnings

from netfilterqueue import COPY_PACKET, NetfilterQueue, Packet

HEADERS = 28  # bytes, of IPv4 and UDP


def drop(packet: Packet) -> None:
    packet.drop()


def accept(packet: Packet) -> None:
    packet.accept()


def mangle(packet: Packet) -> None:
    payload = packet.get_payload()
    packet.set_payload(payload[:HEADERS] + b"x" * (len(payload) - HEADERS))
    packet.accept()


def main() -> None:
    job, verdict, queue_num, max_len, receive_buffer, *flags = sys.argv[1:]
    # A buffer smaller than asked for is the runner's business: it has sized the rounds by it.
    warnings.simplefilter("ignore", RuntimeWarning)
    queue = NetfilterQueue()
    queue.bind(
        int(queue_num),
        {"drop": drop, "accept": accept, "mangle": mangle}[verdict],
        max_len=int(max_len),
        mode=COPY_PACKET,
        sock_len=int(receive_buffer),
        **dict.fromkeys(flags, True),
    )
    print("ready", flush=True)
    if job == "serve":
        queue.run()
    for _ in sys.stdin:
        start = time.perf_counter()
        queue.run(block=False)
        print(f"{time.perf_counter() - start:.9f}", flush=True)


if __name__ == "__main__":
    main()

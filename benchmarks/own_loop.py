"""A contestant: the two ways to have a queue's packets read by a socket object of the program's.

    python own_loop.py lowlevel|run_socket drain drop|accept QUEUE MAX_LEN RECEIVE_BUFFER

Does what classic_api.py does for ``drain``.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
import warnings
from collections.abc import Callable

from arena import size_receive_buffer
from netfilterqueue import NetfilterQueue, lowlevel

READ_SIZE = 69632  # bytes; what run_socket asks for


def start_lowlevel(
    verdict: str, queue_num: int, max_len: int, receive_buffer: int
) -> Callable[[], None]:
    number = {"drop": lowlevel.NF_DROP, "accept": lowlevel.NF_ACCEPT}[verdict]

    def decide(data: lowlevel.NetfilterQueueData) -> None:
        data.set_verdict(number)

    handle = lowlevel.open()
    sock = socket.fromfd(handle.fd(), socket.AF_NETLINK, socket.SOCK_RAW)
    size_receive_buffer(sock, receive_buffer)
    sock.setblocking(False)
    handle.create_queue(queue_num, decide).set_maxlen(max_len)

    def drain() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                handle.handle_packet(sock.recv(READ_SIZE))

    return drain


def start_run_socket(
    verdict: str, queue_num: int, max_len: int, receive_buffer: int
) -> Callable[[], None]:
    # A buffer smaller than asked for is the runner's business: it has sized the rounds by it.
    warnings.simplefilter("ignore", RuntimeWarning)
    queue = NetfilterQueue()
    sock = socket.fromfd(queue.fileno(), socket.AF_NETLINK, socket.SOCK_RAW)
    sock.setblocking(False)
    decide = {"drop": lambda packet: packet.drop(), "accept": lambda packet: packet.accept()}
    queue.bind(queue_num, decide[verdict], max_len=max_len, sock_len=receive_buffer)
    return lambda: queue.run_socket(sock)


def main() -> None:
    way, _, verdict, *numbers = sys.argv[1:]
    start = {"lowlevel": start_lowlevel, "run_socket": start_run_socket}[way]
    drain = start(verdict, *map(int, numbers))
    print("ready", flush=True)
    for _line in sys.stdin:
        begin = time.perf_counter()
        drain()
        print(f"{time.perf_counter() - begin:.9f}", flush=True)


if __name__ == "__main__":
    main()

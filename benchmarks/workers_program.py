"""A contestant: `serve` on so many queues, from number 1 on.

    python workers_program.py processes|threads COUNT light|heavy MAX_LEN RECEIVE_BUFFER

Drops every packet: at once, or after work of the order of what a filter does that parses.
"""

from __future__ import annotations

import logging
import sys
import warnings

from netfilterqueue import Packet
from netfilterqueue.workers import serve


def light(packet: Packet) -> None:
    packet.drop()


def heavy(packet: Packet) -> None:
    sum(packet.get_payload())
    for _ in range(200):
        pass
    packet.drop()


def main() -> None:
    kind, count, work, max_len, receive_buffer = sys.argv[1:]
    # A buffer smaller than asked for is the runner's business: it has sized the rounds by it.
    warnings.simplefilter("ignore", RuntimeWarning)
    # The runner waits for the first message, that of workers being there.
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    serve(
        {"light": light, "heavy": heavy}[work],
        range(1, int(count) + 1),
        processes=kind == "processes",
        max_len=int(max_len),
        sock_len=int(receive_buffer),
    )


if __name__ == "__main__":
    main()

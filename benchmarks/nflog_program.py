"""A contestant: nflogr's API, so that one program measures every library that offers it.

    python nflog_program.py LIBRARY iterate|look GROUP MESSAGES THRESHOLD RECEIVE_BUFFER

LIBRARY is ``nflogr`` or ``netfilterqueue.nflog``. Opens the group and prints "ready". For each line
on standard input, takes as many messages, which are pending, and prints the seconds from the first
read to the last message. ``look`` also asks each for its prefix, mark and payload.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# What is left when no more messages come; without it the last few would wait for others.
TIMEOUT = 0.01  # seconds


def iterate(messages: Iterator[Any], wanted: int) -> int:
    # Nothing but the iteration; it ends before so many only if somebody stops it.
    for _ in itertools.islice(messages, wanted):
        pass
    return wanted


def look(messages: Iterator[Any], wanted: int) -> int:
    count = 0
    for data in itertools.islice(messages, wanted):
        count += data.prefix == "" and data.nfmark == 0 and len(data.payload) > 0
    return count


def main() -> None:
    library, job, group, messages, threshold, receive_buffer = sys.argv[1:]
    take: Callable[[Iterator[Any], int], int] = {"iterate": iterate, "look": look}[job]
    log = importlib.import_module(library).open(
        int(group), timeout=TIMEOUT, qthresh=int(threshold), rcvbuf=int(receive_buffer)
    )
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        count = take(iter(log), int(messages))
        seconds = time.perf_counter() - start
        print(f"{seconds:.9f} {count}", flush=True)


if __name__ == "__main__":
    main()

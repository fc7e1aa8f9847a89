"""How long it takes from stop() in one thread until the loop in another returns: idle, and busy."""

from __future__ import annotations

import argparse
import statistics
import threading
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from arena import PAYLOAD, Arena
from contest import Contestant, Result, turns
from loops import LABELS, kinds_of_loop

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST = 1000.0  # microseconds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=3, only=["this"])


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    kinds = kinds_of_loop(contestants, {**LABELS, "run_socket": "run_socket"})
    result = Result(
        title=f"stopping: from stop() to the return of the loop, {options.rounds} rounds",
        unit="microseconds",
        digits=0,
        contestants=kinds,
    )
    for kind in turns(kinds, options.rounds):
        for state in ("idle", "busy"):
            percentiles = statistics.quantiles(time_stops(kind, state), n=100)
            result.add(f"{state}, p50", kind, percentiles[49] * 1e6)
            result.add(f"{state}, p99", kind, percentiles[98] * 1e6)
    for measure in ("idle, p99", "busy, p99"):
        for kind in kinds:
            median = statistics.median(result.samples[measure][kind.key])
            result.want(
                f"{measure}: {kind.label}: 1 ms", f"{median:.0f} microseconds", median < MOST
            )
    return result


def time_stops(kind: Contestant, state: str) -> list[float]:
    with Arena(kind, "stop", "accept") as arena:
        arena.tell()
        if state == "idle":
            return list(map(float, arena.hear().split()))
        with flood(arena):
            return list(map(float, arena.hear().split()))


@contextmanager
def flood(arena: Arena) -> Iterator[None]:
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            with suppress(OSError):  # the queue is full
                arena.sender.send(PAYLOAD)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        yield
    finally:
        ended.set()
        sending.join()

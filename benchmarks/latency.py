"""What the queue adds to a packet's way: a request and its reply, both accepted by the contestant.

NetfilterQueue 1.1.0 takes part twice. How much it differs from itself is the noise: this library
is no worse as long as it differs by no more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from arena import PACKET_SIZE, PAYLOAD, Arena
from contest import Contestant, Result, positive, turns

MEASURES = {"p50": 50, "p99": 99}
WARM_UP = 100  # round trips that do not count


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trips", type=positive, default=1000, help="a round (default 1000)")
    parser.add_argument("--rate", type=float, default=1000, help="trips a second (default 1000)")
    parser.set_defaults(rounds=7)


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    again = [
        replace(one, key="again", label=f"{one.label} again")
        for one in contestants
        if one.key == "classic"
    ]
    result = Result(
        title=f"latency: round trip of a UDP packet of {PACKET_SIZE} bytes, queued both ways, "
        f"{options.trips} times at {options.rate:g} a second, {options.rounds} rounds",
        unit="microseconds",
        digits=1,
        contestants=[*contestants, *again],
        references=("classic",),
    )
    for _ in range(options.rounds):
        for contestant, trips in round_trips(result.contestants, options).items():
            percentiles = statistics.quantiles(trips, n=100)
            for measure, percent in MEASURES.items():
                result.add(measure, contestant, percentiles[percent - 1] * 1e6)
    if result.took_part("this", "classic"):
        for measure in MEASURES:
            ratio = result.ratio(measure, "this", "classic")
            itself = result.ratio(measure, "again", "classic")
            noise = max(itself.high, 1 / itself.low)
            text = f"{measure}: no more than {noise:.2f} times NetfilterQueue 1.1.0 (the noise)"
            result.want(text, ratio.text(2), ratio.median <= noise)
    return result


def round_trips(
    contestants: Sequence[Contestant], options: argparse.Namespace
) -> dict[Contestant, list[float]]:
    """The seconds that each took.

    All contestants wait in arenas of their own, which costs nothing, and are measured by turns trip
    by trip: whatever else disturbs the machine for a moment then disturbs all of them alike.
    """
    trips: dict[Contestant, list[float]] = {contestant: [] for contestant in contestants}
    with ExitStack() as stack:
        arenas = {one: stack.enter_context(Arena(one, "serve", "accept")) for one in contestants}
        for arena in arenas.values():
            arena.receiver.connect(arena.sender.getsockname())
        for contestant in turns(contestants, WARM_UP + options.trips):
            time.sleep(1 / options.rate)
            trips[contestant].append(round_trip(arenas[contestant]))
        for arena in arenas.values():
            arena.expect(queued=0)
    return {contestant: seconds[WARM_UP:] for contestant, seconds in trips.items()}


def round_trip(arena: Arena) -> float:
    start = time.perf_counter()
    arena.sender.send(PAYLOAD)
    arena.receive(arena.receiver)
    arena.receiver.send(PAYLOAD)
    arena.receive(arena.sender)
    return time.perf_counter() - start

"""The kinds of loop against each other: emptying a full queue, round trips, and waiting idle.

All are this library's, with the same batch; what is done with each packet is the same too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import drain
import idle
import latency
from arena import PACKET_SIZE, ContestError, fitting
from contest import Contestant, Result, positive, turns

PROGRAM = Path(__file__).with_name("loop_program.py")
LABELS = {
    "callback": "run, a callback",
    "read": "read",
    "for": "for",
    "async_for": "async for (asyncio)",
    "aread": "aread (asyncio)",
}
# The least part of the callback's rate.
WANTED = {"read": 0.9, "for": 0.9, "async_for": 0.7, "aread": 0.7}


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--measure", choices=("rate", "latency", "idle"), default="rate", help="(default rate)")
    add("--packets", type=positive, default=30_000, help="in the queue (default 30000)")
    add("--trips", type=positive, default=1000, help="of each, a round (default 1000)")
    add("--rate", type=float, default=1000, help="round trips a second (default 1000)")
    add("--seconds", type=float, default=5, help="idle (default 5)")
    parser.set_defaults(rounds=7, only=["this"])


def kinds_of_loop(contestants: Sequence[Contestant], labels: dict[str, str]) -> list[Contestant]:
    """This library, once for each kind."""
    for one in contestants:
        if one.key == "this":
            before = one.command[:-1]
            return [
                replace(one, key=key, label=label, command=(*before, str(PROGRAM), key))
                for key, label in labels.items()
            ]
    raise ContestError("other libraries have no such loops: leave --only out")


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    kinds = kinds_of_loop(contestants, LABELS)
    measure = {"rate": measure_rate, "latency": measure_latency, "idle": measure_idle}
    return measure[options.measure](options, kinds)


def measure_rate(options: argparse.Namespace, kinds: list[Contestant]) -> Result:
    packets, notes = fitting(options.packets)
    result = Result(
        title=f"loops: {packets} UDP packets of {PACKET_SIZE} bytes, {options.rounds} rounds",
        unit="1000 packets/s",
        digits=0,
        contestants=kinds,
        references=("callback",),
        notes=notes,
    )
    for verdict in (drain.DROP, drain.ACCEPT):
        for kind in turns(kinds, options.rounds):
            result.add(verdict, kind, packets / drain.drain(kind, verdict, packets) / 1000)
        for key, least in WANTED.items():
            ratio = result.ratio(verdict, key, "callback")
            text = f"{verdict}: {result.label(key)}: at least {least} times the callback"
            result.want(text, ratio.text(2), ratio.median >= least)
    return result


def measure_latency(options: argparse.Namespace, kinds: list[Contestant]) -> Result:
    result = Result(
        title=f"loops: round trip of a UDP packet of {PACKET_SIZE} bytes, queued both ways, "
        f"{options.trips} times at {options.rate:g} a second, {options.rounds} rounds",
        unit="microseconds",
        digits=1,
        contestants=kinds,
        references=("callback",),
    )
    for _ in range(options.rounds):
        for kind, trips in latency.round_trips(kinds, options).items():
            percentiles = statistics.quantiles(trips, n=100)
            for measure, percent in latency.MEASURES.items():
                result.add(measure, kind, percentiles[percent - 1] * 1e6)
    return result


def measure_idle(options: argparse.Namespace, kinds: list[Contestant]) -> Result:
    result = Result(
        title=f"loops: a bound queue in {options.seconds:g} s without traffic",
        unit="system calls" if idle.STRACE else "context switches",
        digits=0,
        contestants=kinds,
    )
    for kind in kinds:
        before, after = idle.observe(kind, options.seconds)
        result.add("before traffic", kind, before)
        result.add("after traffic", kind, after)
        result.want(f"{kind.label}: none", f"{before + after}", before + after == 0)
    return result

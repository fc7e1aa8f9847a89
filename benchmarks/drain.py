"""How fast a full queue is emptied: one callback a packet, all dropped, then all accepted.

The queue is filled while nobody reads. The clock, in the contestant, runs from the first read until
the last verdict has been sent; the kernel's counters and the socket at the other end prove that
every packet was decided as told.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from arena import CHARGE, PACKET_SIZE, PAYLOAD, Arena, ContestError, fitting
from contest import Contestant, Result, positive, turns

DROP, ACCEPT = "drop", "accept"
WANTED = [
    # measure, reference, least ratio
    (DROP, "classic", 1.9),
    (ACCEPT, "classic", 1.4),
    (DROP, "c", 0.85),
    (ACCEPT, "c", 0.85),
]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--packets", type=positive, default=30_000, help="in the queue (default 30000)"
    )
    parser.set_defaults(rounds=7)


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    packets, notes = fitting(options.packets)
    result = Result(
        title=f"drain: {packets} UDP packets of {PACKET_SIZE} bytes, {options.rounds} rounds",
        unit="1000 packets/s",
        digits=0,
        contestants=contestants,
        references=("classic", "c"),
        notes=notes,
    )
    for verdict in (DROP, ACCEPT):
        for contestant in turns(contestants, options.rounds):
            rate = packets / drain(contestant, verdict, packets)
            result.add(verdict, contestant, rate / 1000)
    for measure, reference, least in WANTED:
        if result.took_part("this", reference):
            ratio = result.ratio(measure, "this", reference)
            text = f"{measure}: at least {least} times {result.label(reference)}"
            result.want(text, ratio.text(2), ratio.median >= least)
    return result


def drain(contestant: Contestant, verdict: str, packets: int) -> float:
    """The seconds that it took."""
    with Arena(
        contestant, "drain", verdict, max_len=packets, receive_buffer=packets * CHARGE
    ) as arena:
        seconds = arena.drain(PAYLOAD, packets)
        arrived = sum(1 for _ in arena.arrived())
        if arrived != (packets if verdict == ACCEPT else 0):
            raise ContestError(f"{contestant.label}: {arrived} of {packets} packets arrived")
    return seconds

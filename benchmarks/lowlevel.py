"""How fast a loop of one's own is: netfilterqueue.lowlevel, against run_socket with the same reads.

Both read one packet with one system call, by the recv() of a socket object, and decide it with
another, in a Python callback. As in drain, the queue is filled while nobody reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import environments
from arena import PACKET_SIZE, fitting
from contest import Contestant, Result, positive, turns
from drain import ACCEPT, DROP, drain

LABELS = {"lowlevel": "lowlevel", "run_socket": "run_socket"}
# What two runs of the same program differ by on a quiet machine.
NOISE = 0.03


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--packets", type=positive, default=30_000, help="in the queue (default 30000)"
    )
    parser.set_defaults(rounds=7)


def run(options: argparse.Namespace, _: Sequence[Contestant]) -> Result:
    packets, notes = fitting(options.packets)
    script = str(environments.HERE / "own_loop.py")
    contestants = [
        Contestant(key, label, (*options.under, sys.executable, "-E", "-s", script, key))
        for key, label in LABELS.items()
    ]
    result = Result(
        title=f"lowlevel: {packets} UDP packets of {PACKET_SIZE} bytes, {options.rounds} rounds",
        unit="1000 packets/s",
        digits=0,
        contestants=contestants,
        references=("run_socket",),
        notes=notes,
    )
    for verdict in (DROP, ACCEPT):
        for contestant in turns(contestants, options.rounds):
            rate = packets / drain(contestant, verdict, packets)
            result.add(verdict, contestant, rate / 1000)
        ratio = result.ratio(verdict, "lowlevel", "run_socket")
        text = f"{verdict}: no slower than run_socket (but for a noise of {NOISE:.0%})"
        result.want(text, ratio.text(2), ratio.median >= 1 - NOISE)
    return result

"""How fast a full queue is emptied if each packet's payload is replaced: one callback a packet.

As in drain, the queue is filled while nobody reads. Packets have a length of 1400 bytes and no UDP
checksum, so that no library has the work of one.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from arena import Arena, ContestError, fitting
from contest import Contestant, Result, positive, turns

SIZE = 1400  # bytes, the headers of IPv4 and UDP included
SENT = bytes(SIZE - 28)
WANTED = b"x" * len(SENT)
# What a packet of this size is charged for in a receive buffer: 2304 bytes on Linux 6.18.
CHARGE = 3072
SO_NO_CHECK = 11  # asm-generic/socket.h; not in the module socket
LEAST = 1.4


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--packets", type=positive, default=10_000, help="in the queue (default 10000)"
    )
    parser.set_defaults(rounds=7)


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    packets, notes = fitting(options.packets, CHARGE)
    result = Result(
        title=f"mangle: {packets} UDP packets of {SIZE} bytes, {options.rounds} rounds",
        unit="1000 packets/s",
        digits=0,
        contestants=contestants,
        references=("classic", "c"),
        notes=notes,
    )
    for contestant in turns(contestants, options.rounds):
        result.add("replace", contestant, packets / mangle(contestant, packets) / 1000)
    if result.took_part("this", "classic"):
        ratio = result.ratio("replace", "this", "classic")
        text = f"at least {LEAST} times {result.label('classic')}"
        result.want(text, ratio.text(2), ratio.median >= LEAST)
    return result


class WithoutChecksums(Arena):
    def set_up(self, stack: ExitStack) -> None:
        super().set_up(stack)
        self.sender.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)


def mangle(contestant: Contestant, packets: int) -> float:
    """The seconds that it took."""
    with WithoutChecksums(
        contestant, "drain", "mangle", max_len=packets, receive_buffer=packets * CHARGE
    ) as arena:
        seconds = arena.drain(SENT, packets)
        arrived = sum(payload == WANTED for payload in arena.arrived())
        if arrived != packets:
            raise ContestError(f"{contestant.label}: {arrived} of {packets} packets replaced")
    return seconds

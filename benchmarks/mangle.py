"""How fast a full queue is emptied if each packet's payload is replaced: one callback a packet.

As in drain, the queue is filled while nobody reads. Packets have a length of 1400 bytes and no UDP
checksum, so that no library has the work of one.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from arena import Arena, ContestError
from contest import Contestant, Result, positive, turns
from drain import capacity

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
    packets = min(options.packets, capacity(options.packets, CHARGE))
    result = Result(
        title=f"mangle: {packets} UDP packets of {SIZE} bytes, {options.rounds} rounds",
        unit="1000 packets/s",
        digits=0,
        contestants=contestants,
        references=("classic", "c"),
    )
    if packets < options.packets:
        result.notes.append(
            f"net.core.rmem_max allows receive buffers for {packets} packets, not for "
            f"{options.packets}: root of the machine may have larger ones."
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
        for _ in range(packets):
            arena.sender.send(SENT)
        arena.expect(queued=packets)
        arena.tell()
        seconds = float(arena.hear())
        arena.expect(queued=0)
        arrived = arrived_replaced(arena.receiver)
        if arrived != packets:
            raise ContestError(f"{contestant.label}: {arrived} of {packets} packets replaced")
    return seconds


def arrived_replaced(sock: socket.socket) -> int:
    sock.setblocking(False)
    count = 0
    while True:
        try:
            payload = sock.recv(SIZE)
        except BlockingIOError:
            return count
        count += payload == WANTED

"""How fast a full queue is emptied: one callback a packet, all dropped, then all accepted.

The queue is filled while nobody reads. The clock, in the contestant, runs from the first read until
the last verdict has been sent; the kernel's counters and the socket at the other end prove that
every packet was decided as told.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence

from arena import PACKET_SIZE, PAYLOAD, Arena, ContestError, size_receive_buffer
from contest import Contestant, Result, positive, turns

DROP, ACCEPT = "drop", "accept"
# What a small packet is charged for in a receive buffer: 832 bytes on Linux 6.18. A page's quarter
# leaves other kernels room.
CHARGE = 1024
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
    packets = min(options.packets, capacity(options.packets))
    result = Result(
        title=f"drain: {packets} UDP packets of {PACKET_SIZE} bytes, {options.rounds} rounds",
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


def capacity(packets: int, charge: int = CHARGE) -> int:
    """How many packets the receive buffer holds that the user may have for this many."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return size_receive_buffer(sock, packets * charge) // charge


def drain(contestant: Contestant, verdict: str, packets: int) -> float:
    """The seconds that it took."""
    with Arena(
        contestant, "drain", verdict, max_len=packets, receive_buffer=packets * CHARGE
    ) as arena:
        for _ in range(packets):
            arena.sender.send(PAYLOAD)
        arena.expect(queued=packets)
        arena.tell()
        seconds = float(arena.hear())
        arena.expect(queued=0)
        arrived = count_pending(arena.receiver)
        if arrived != (packets if verdict == ACCEPT else 0):
            raise ContestError(f"{contestant.label}: {arrived} of {packets} packets arrived")
    return seconds


def count_pending(sock: socket.socket) -> int:
    sock.setblocking(False)
    count = 0
    while True:
        try:
            sock.recv(PACKET_SIZE)
        except BlockingIOError:
            return count
        count += 1

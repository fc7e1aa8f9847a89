"""Two workers against one: the same packets, all in one queue or half of them in each of two.

The queues are filled while the workers are halted. The clock, in the runner, runs from when they go
on until the kernel has no packet left in any of the queues.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from arena import (
    CHARGE,
    DEADLINE,
    PACKET_SIZE,
    PAYLOAD,
    ContestError,
    fitting,
    may_force_buffers,
)
from contest import Contestant, Result, positive, turns
from netfilterqueue.testing import Node, Sandbox

PROGRAM = Path(__file__).with_name("workers_program.py")
TEAMS = {
    "one": ("one process", "processes", 1),
    "two": ("two processes", "processes", 2),
    "threads": ("two threads", "threads", 2),
}
WORK = ("light", "heavy")
LEAST = 1.5
POLL = 0.0005  # seconds


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packets", type=positive, default=60_000, help="(default 60000)")
    parser.set_defaults(rounds=5)


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    this = next((one for one in contestants if one.key == "this"), None)
    if this is None:
        raise ContestError("other libraries have no workers: leave --only out")
    script = (*this.command[:-1], str(PROGRAM))
    teams = [
        replace(this, key=key, label=label, command=(*script, kind, str(count)))
        for key, (label, kind, count) in TEAMS.items()
    ]
    packets, notes = fitting(options.packets)
    packets -= packets % 2
    result = Result(
        title=f"workers: {packets} UDP packets of {PACKET_SIZE} bytes dropped by the handler, "
        f"{options.rounds} rounds",
        unit="1000 packets/s",
        digits=0,
        contestants=teams,
        references=("one",),
        notes=notes,
    )
    for work in WORK:
        for team in turns(teams, options.rounds):
            result.add(work, team, packets / empty(team, work, packets) / 1000)
    ratio = result.ratio("heavy", "two", "one")
    result.want(f"heavy: at least {LEAST} times one", ratio.text(2), ratio.median >= LEAST)
    return result


def empty(team: Contestant, work: str, packets: int) -> float:
    """The seconds that a team takes."""
    count = TEAMS[team.key][2]
    share = packets // count
    command = [*team.command, work, str(packets), str(share * CHARGE)]
    with Sandbox(user_namespace=not may_force_buffers()) as sandbox:
        router = sandbox.router
        process = router.popen(command, stdout=subprocess.PIPE)
        if not select.select([process.stdout], [], [], DEADLINE)[0]:
            raise ContestError(f"{team.label} did not start")
        halted = [process.pid, *children(process.pid)]
        for pid in halted:
            os.kill(pid, signal.SIGSTOP)
        for number in range(1, count + 1):
            fill(router, number, share)
        if depths(process.pid) != [share] * count:
            raise ContestError(f"{share} packets should wait in each of {count} queues")
        start = time.perf_counter()
        for pid in halted:
            os.kill(pid, signal.SIGCONT)
        while any(depths(process.pid)):
            if time.perf_counter() - start > DEADLINE:
                raise ContestError(f"{team.label} is not ready after {DEADLINE} seconds")
            time.sleep(POLL)
        seconds = time.perf_counter() - start
        process.terminate()
        process.communicate(timeout=DEADLINE)
    return seconds


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def depths(pid: int) -> list[int]:
    """How many packets wait in each queue of a process's network namespace."""
    table = Path(f"/proc/{pid}/net/netfilter/nfnetlink_queue").read_text()
    return [int(line.split()[2]) for line in table.splitlines()]


def fill(router: Node, number: int, packets: int) -> None:
    """Send packets to the queue of this number, which is their port, too."""
    router.rule("INPUT", "-p", "udp", "--dport", number, queue=number)
    with router.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", number))
        for _ in range(packets):
            sender.send(PAYLOAD)

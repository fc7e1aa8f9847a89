"""The system calls of a bound queue that nothing arrives at: before any traffic, and after some."""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from arena import PAYLOAD, Arena, ContestError
from contest import Contestant, Result, turns

STRACE = shutil.which("strace")
BURSTS = 20
BURST = 100  # packets; fewer than any default of a queue's length or receive buffer
SETTLE = 2.0  # seconds in which what the traffic started may still end
# A line of strace's log that begins a system call, and not its end, a signal or a thread's exit.
SYSTEM_CALL = re.compile(r"^\d+ +\w+\(", re.MULTILINE)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=5, help="to count for (default 5)")
    parser.set_defaults(rounds=1)


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    result = Result(
        title=f"idle: a bound queue in {options.seconds:g} s without traffic",
        unit="system calls" if STRACE else "context switches",
        digits=0,
        contestants=contestants,
    )
    if not STRACE:
        result.notes.append(
            "strace is missing (Debian: apt install strace). What is counted instead, context "
            "switches, does not show a system call that never waits."
        )
    for contestant in turns(contestants, options.rounds):
        before, after = observe(contestant, options.seconds)
        result.add("before traffic", contestant, before)
        result.add("after traffic", contestant, after)
    if result.took_part("this"):
        for measure, samples in result.samples.items():
            most = max(samples["this"])
            result.want(f"{measure}: none", f"{most:g}", most == 0)
    return result


def observe(contestant: Contestant, seconds: float) -> tuple[int, int]:
    """What is counted in these many seconds without traffic: before any, and after some."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        if STRACE:
            traced = (STRACE, "-f", "-qq", "-I2", "-o", str(log), *contestant.command)
            contestant = replace(contestant, command=traced)
        with Arena(contestant, "serve", "accept") as arena:

            def count() -> int:
                return system_calls(log) if STRACE else context_switches(arena.process.pid)

            before = growth(count, seconds)
            quiet = count()
            flood(arena)
            if count() == quiet:
                raise ContestError(f"what {contestant.label} does cannot be counted")
            return before, growth(count, seconds)


def growth(count: Callable[[], int], seconds: float) -> int:
    time.sleep(SETTLE)
    before = count()
    time.sleep(seconds)
    return count() - before


def flood(arena: Arena) -> None:
    """Bursts, so that several packets come with one read: this is what starts helper threads."""
    for _ in range(BURSTS):
        for _ in range(BURST):
            arena.sender.send(PAYLOAD)
        for _ in range(BURST):
            arena.receive(arena.receiver)


def system_calls(log: Path) -> int:
    return len(SYSTEM_CALL.findall(log.read_text()))


def context_switches(pid: int) -> int:
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(n) for text in statuses for n in re.findall(r"ctxt_switches:\s+(\d+)", text))

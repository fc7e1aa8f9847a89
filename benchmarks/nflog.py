"""How fast log messages are read: one Python iteration each, by the rule's --nflog-threshold.

The receive buffer is filled while nobody reads, with 64-byte UDP packets logged on INPUT; the
clock, in the contestant, runs from the first read to the last message. With a threshold of 100 the
kernel sends as many messages together as fit into its buffer, which is as large as it is by
default. A third measure also asks each message for its prefix, mark and payload. nflogr, from PyPI,
runs in an environment of its own, on Python 3.9 or earlier.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import environments
from arena import CHARGE, DEADLINE, LOOPBACK, PACKET_SIZE, PAYLOAD, ContestError, Stage, fitting
from contest import Contestant, Result, positive, turns

GROUP = 1
ITERATE, LOOK = "iterate", "look"
MEASURES = {
    # what the table calls it: the job of the contestants, --nflog-threshold
    "threshold 1": (ITERATE, 1),
    "threshold 100": (ITERATE, 100),
    "threshold 100, looked at": (LOOK, 100),
}
WANTED = [
    # measure, reference, least ratio
    ("threshold 100", "nflogr", 10),
    ("threshold 1", "nflogr", 3),
    ("threshold 100", "c", 0.8),
]


class LogStage(Stage):
    """A contestant with its group open; what `sender` sends is logged and goes nowhere."""

    def __init__(
        self, contestant: Contestant, job: str, messages: int, threshold: int, receive_buffer: int
    ) -> None:
        self.threshold = threshold
        super().__init__(contestant, job, GROUP, messages, threshold, receive_buffer)

    def set_up(self, stack: ExitStack) -> None:
        match = ("INPUT", "-i", "lo", "-p", "udp")
        target = ("--nflog-group", GROUP, "--nflog-threshold", self.threshold)
        self.router.rule(*match, "-j", "NFLOG", *target)
        self.router.rule(*match, "-j", "DROP")
        self.sender = stack.enter_context(self.router.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.sender.connect(LOOPBACK)

    def await_delivery(self) -> None:
        """Wait until no message waits in the kernel for others."""
        deadline = time.monotonic() + DEADLINE
        while any(row[0] == GROUP and row[2] for row in self.rows("nfnetlink_log")):
            if time.monotonic() > deadline:
                raise ContestError("the kernel keeps messages back")
            time.sleep(0.01)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--messages", type=positive, default=30_000, help="in the buffer (default 30000)"
    )
    parser.set_defaults(rounds=7)


def run(options: argparse.Namespace, _: Sequence[Contestant]) -> Result:
    messages, notes = fitting(options.messages)
    contestants = competitors(options.under, notes)
    result = Result(
        title=f"nflog: {messages} UDP packets of {PACKET_SIZE} bytes, {options.rounds} rounds",
        unit="1000 messages/s",
        digits=0,
        contestants=contestants,
        references=("nflogr", "c"),
        notes=notes,
    )
    for measure, (job, threshold) in MEASURES.items():
        able = [each for each in contestants if job == ITERATE or each.key != "c"]
        for contestant in turns(able, options.rounds):
            rate = messages / drain(contestant, job, messages, threshold)
            result.add(measure, contestant, rate / 1000)
    for measure, reference, least in WANTED:
        if result.took_part(reference):
            ratio = result.ratio(measure, "this", reference)
            text = f"{measure}: at least {least} times {result.label(reference)}"
            result.want(text, ratio.text(2), ratio.median >= least)
    return result


def competitors(under: Sequence[str], notes: list[str]) -> list[Contestant]:
    """This library, nflogr where it can be had (else a note says so), and the C loop."""
    program = str(environments.HERE / "nflog_program.py")
    loop = str(environments.c_program("nflog_loop"))
    this = (*under, sys.executable, "-I", program, "netfilterqueue.nflog")
    found = [Contestant("this", "this library", this), Contestant("c", "C loop", (*under, loop))]
    try:
        python = str(environments.nflogr())
    except environments.CannotBuild as error:
        notes.append(f"Without nflogr: {error}.")
    else:
        nflogr = (*under, python, "-I", program, "nflogr")
        found.insert(1, Contestant("nflogr", "nflogr 0.2.12", nflogr))
    return found


def drain(contestant: Contestant, job: str, messages: int, threshold: int) -> float:
    """The seconds that it took."""
    with LogStage(contestant, job, messages, threshold, messages * CHARGE) as stage:
        for _ in range(messages):
            stage.sender.send(PAYLOAD)
        stage.await_delivery()
        stage.tell()
        seconds, taken = stage.hear().split()
        if int(taken) != messages:
            raise ContestError(f"{contestant.label}: {taken} of {messages} messages")
    return float(seconds)

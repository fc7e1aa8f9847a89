"""TCP bulk through a queue: iperf3 from host to host, past a router that has a queue in between.

What the router forwards, data and acknowledgements alike, waits in the queue until it is accepted:
an inline filter. Hosts and router are joined by veth with an MTU of 1500, and queues are bound with
the defaults of bind(), which are the same in NetfilterQueue 1.1.0. With the flag gso the queue gets
packets as TCP makes them, up to 64 KiB; without, the kernel cuts each one into segments first.

Everybody's hosts and router stand until the end, which costs nothing, and transfers are short:
those of a round follow each other closely. The first transfer of each does not count. Nobody is
pinned to a CPU: of two, that makes the figures little steadier, and those with gso a tenth lower.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from arena import DEADLINE, QUEUE, ContestError, QueueStage
from contest import Contestant, Result, turns
from netfilterqueue.testing import Node

PORT = 5201
LISTENING = "0A"  # in /proc/net/tcp: TCP_LISTEN of include/net/tcp_states.h
# The defaults of bind(), here and in NetfilterQueue 1.1.0.
MAX_LEN = 1024
RECEIVE_BUFFER = 2455552  # bytes
GSO = "gso"
UNQUEUED = "unqueued"
WANTED = [
    # contestant, reference, least ratio
    ("this-gso", "classic", 12),
    ("this-gso", "c-gso", 0.8),
    ("this", "classic", 2),
]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=1, help="of each transfer (default 1)")
    parser.set_defaults(rounds=9)


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    if not shutil.which("iperf3"):
        raise ContestError("iperf3 is missing (Debian: apt install iperf3)")
    everybody = [
        *(replace(one, key=UNQUEUED, label="no queue") for one in contestants[:1]),
        *(with_gso(one) for one in contestants if one.key != "classic"),
        *contestants,
    ]
    result = Result(
        title=f"tcp: iperf3 past a router, all queued, MTU 1500, {options.seconds:g} s, "
        f"{options.rounds} rounds",
        unit="Gbit/s",
        digits=2,
        contestants=everybody,
        references=("classic", "c", "c-gso"),
    )
    with ExitStack() as stack:
        routers = {one: stack.enter_context(Router(one)) for one in everybody}
        for router in routers.values():
            router.transfer(options.seconds)
        for contestant in turns(everybody, options.rounds):
            rate = routers[contestant].transfer(options.seconds)
            result.add("accept", contestant, rate / 1e9)
    for key, reference, least in WANTED:
        if result.took_part(key, reference):
            ratio = result.ratio("accept", key, reference)
            text = f"{result.label(key)}: at least {least} times {result.label(reference)}"
            result.want(text, ratio.text(2), ratio.median >= least)
    return result


def with_gso(contestant: Contestant) -> Contestant:
    """It once more; NetfilterQueue 1.1.0 has no such flag."""
    return replace(contestant, key=f"{contestant.key}-{GSO}", label=f"{contestant.label}, {GSO}")


class Router(QueueStage):
    """A contestant on the router, and iperf3 at both of its sides."""

    def __init__(self, contestant: Contestant) -> None:
        super().__init__(
            contestant,
            "serve",
            "accept",
            max_len=MAX_LEN,
            receive_buffer=RECEIVE_BUFFER,
            flags=(GSO,) if contestant.key.endswith(GSO) else (),
        )

    def set_up(self, stack: ExitStack) -> None:
        self.client, server = self.hosts
        self.address = server.ipv4
        # Where there is no rule, what the contestant has bound stays empty.
        if self.contestant.key != UNQUEUED:
            self.router.rule("FORWARD", "-p", "tcp", queue=QUEUE)
        server.popen(["iperf3", "-s"], stdout=subprocess.DEVNULL)
        wait_for_listener(server)

    def transfer(self, seconds: float) -> float:
        """The rate at which data arrived, in bits a second."""
        command = ["iperf3", "-c", self.address, "-t", str(seconds), "--json"]
        report = self.client.run(command, timeout=DEADLINE)
        if self.process.poll() is not None:
            text = f"{self.contestant.label} ended, status {self.process.returncode}"
            raise ContestError(text)
        return float(json.loads(report.stdout)["end"]["sum_received"]["bits_per_second"])


def wait_for_listener(node: Node) -> None:
    deadline = time.monotonic() + DEADLINE
    while not any(is_listener(line) for line in sockets_of(node)):
        if time.monotonic() > deadline:
            raise ContestError("iperf3 does not listen")
        time.sleep(0.01)


def sockets_of(node: Node) -> list[str]:
    return [
        line
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/{node.pid}/net/{name}").read_text().splitlines()[1:]
    ]


def is_listener(line: str) -> bool:
    _, local, _, state, *_ = line.split()
    return state == LISTENING and int(local.rpartition(":")[2], 16) == PORT

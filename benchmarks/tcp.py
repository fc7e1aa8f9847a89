"""TCP bulk through a queue: iperf3 from host to host, every packet of the data accepted on its way.

The hosts are joined to the router by veth with an MTU of 1500. With the flag gso the queue gets the
packets as TCP makes them, up to 64 KiB; without, the kernel cuts each one into segments first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from arena import DEADLINE, QUEUE, ContestError, QueueStage
from contest import Contestant, Result, turns
from netfilterqueue.testing import Node

PORT = 5201
LISTENING = "0A"  # in /proc/net/tcp: TCP_LISTEN of include/net/tcp_states.h
MAX_LEN = 4096
RECEIVE_BUFFER = 16 << 20  # bytes
GSO = "gso"
WANTED = [
    # contestant, reference, least ratio
    ("this-gso", "classic", 12),
    ("this-gso", "c-gso", 0.8),
    ("this", "classic", 2),
]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=2, help="of each transfer (default 2)")
    parser.set_defaults(rounds=5)


def run(options: argparse.Namespace, contestants: Sequence[Contestant]) -> Result:
    if not shutil.which("iperf3"):
        raise ContestError("iperf3 is missing (Debian: apt install iperf3)")
    both = [
        *(with_gso(one) for one in contestants if one.key != "classic"),
        *contestants,
    ]
    result = Result(
        title=f"tcp: iperf3 forwarded over veth, MTU 1500, {options.seconds:g} s, "
        f"{options.rounds} rounds",
        unit="Gbit/s",
        digits=2,
        contestants=both,
        references=("classic", "c-gso"),
    )
    for contestant in turns(both, options.rounds):
        result.add("accept", contestant, transfer(contestant, options.seconds) / 1e9)
    for key, reference, least in WANTED:
        if result.took_part(key, reference):
            ratio = result.ratio("accept", key, reference)
            text = f"{result.label(key)}: at least {least} times {result.label(reference)}"
            result.want(text, ratio.text(2), ratio.median >= least)
    return result


def with_gso(contestant: Contestant) -> Contestant:
    """It once more; NetfilterQueue 1.1.0 has no such flag."""
    return replace(contestant, key=f"{contestant.key}-{GSO}", label=f"{contestant.label}, {GSO}")


def transfer(contestant: Contestant, seconds: float) -> float:
    """The rate at which data arrived, in bits a second."""
    flags = (GSO,) if contestant.key.endswith(GSO) else ()
    with QueueStage(
        contestant,
        "serve",
        "accept",
        max_len=MAX_LEN,
        receive_buffer=RECEIVE_BUFFER,
        flags=flags,
    ) as stage:
        client, server = stage.hosts
        stage.router.rule("FORWARD", "-p", "tcp", "--dport", PORT, queue=QUEUE)
        server.popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL)
        wait_for_listener(server)
        report = client.run(
            ["iperf3", "-c", server.ipv4, "-t", str(seconds), "--json"], timeout=DEADLINE
        )
        if stage.process.poll() is not None:
            raise ContestError(f"{contestant.label} ended, status {stage.process.returncode}")
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

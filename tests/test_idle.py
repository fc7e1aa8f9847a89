"""A queue on which nothing comes costs nothing: no thread wakes, in any kind of loop."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from support import RECEIVE_BUFFER, numbered, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Program, UdpFlow

# Seconds; whatever looks at something now and then does so far more often.
QUIET = 0.15

PROGRAM = f"""
import asyncio
import os
import socket
import sys
from netfilterqueue import NetfilterQueue


def accept(packet):
    packet.accept()


async def pull():
    async for packet in queue:
        packet.accept()


async def read():
    while True:
        for packet in await queue.aread():
            packet.accept()


def accept_all(packets):
    for packet in packets:
        packet.accept()
    return True


LOOPS = {{
    "run": (accept, lambda: queue.run()),
    "run for a while": (accept, lambda: queue.run(timeout=3600)),
    "run_socket": (accept, lambda: queue.run_socket(
        socket.fromfd(queue.fileno(), socket.AF_NETLINK, socket.SOCK_RAW))),
    "read": (None, lambda: all(map(accept_all, iter(queue.read, [])))),
    "for": (None, lambda: accept_all(queue)),
    "async for": (None, lambda: asyncio.run(pull())),
    "aread": (None, lambda: asyncio.run(read())),
}}
callback, loop = LOOPS[sys.argv[2]]
queue = NetfilterQueue()
queue.bind(int(sys.argv[1]), callback, sock_len={RECEIVE_BUFFER})
print("bound")
loop()
"""

LOOPS = ["run", "run for a while", "run_socket", "read", "for", "async for", "aread"]


def wakes(pid: int) -> int:
    """How often the threads of a process have come to run, or have been interrupted at it."""
    statuses = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(n) for text in statuses for n in re.findall(r"ctxt_switches:\s+(\d+)", text))


def is_quiet(pid: int) -> bool:
    before = wakes(pid)
    time.sleep(QUIET)
    return wakes(pid) == before


@pytest.mark.parametrize("loop", LOOPS)
def test_no_thread_wakes_before_and_after_traffic(
    run_program: Callable[..., Program], queued: Callable[..., UdpFlow], queue_num: int, loop: str
) -> None:
    flow = queued()
    program = run_program(PROGRAM, str(queue_num), loop)
    program.wait_for("bound")
    wait_until(lambda: is_quiet(program.process.pid), what="quiet at first")
    # Together, so that verdicts wait for each other and the helper thread is at work.
    for _ in range(5):
        flow.send(*numbered(20))
        assert flow.receive_all(20) == numbered(20)
    wait_until(lambda: is_quiet(program.process.pid), what="quiet again")
    assert program.process.poll() is None

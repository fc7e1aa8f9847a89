"""Programs that serve queues by workers, and what they tell of their work."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from support import RECEIVE_BUFFER, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Rule
    from support import Program, Traffic, UdpFlow

NETLINK_NETFILTER = 12

# What a datagram says is done; whatever says nothing is accepted.
PROGRAM = f"""
import json, logging, os, signal, sys, threading
from netfilterqueue import Verdict, workers

numbers, fifo, begin, settings, options = json.loads(sys.argv[1])
exec(begin)
for name, value in settings.items():
    setattr(workers, name, value)
logging.basicConfig(level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
held = []

def say(*words):
    # One write each, so that lines of several processes do not mix.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def handler(packet):
    word, _, value = packet.get_payload()[28:].decode().partition(" ")
    cpus = ",".join(map(str, os.sched_getaffinity(0)))
    say("packet", packet.queue_num, os.getpid(), threading.get_native_id(), cpus, word)
    if word == "raise":
        raise ValueError("told to")
    if word == "exit":
        os._exit(int(value))
    if word == "kill":
        os.kill(os.getpid(), int(value))
    if word == "wait":
        open(fifo).close()
    if word in ("hold", "wait"):
        held.append(packet)
        return None
    if word == "release":
        held.pop().accept()
    if word == "drop":
        return Verdict.DROP
    if word == "signals":
        say("signals", signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
            signal.set_wakeup_fd(-1), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    return Verdict.ACCEPT

os.setpgid(0, 0)
try:
    statistics = workers.serve(handler, numbers, sock_len={RECEIVE_BUFFER}, **options)
except workers.WorkerCrashed as crash:
    say("crashed:", crash, "cause:", repr(crash.__cause__), "statistics:", crash.statistics)
    sys.exit(9)
say("statistics:", statistics)
say("refused", dict(statistics.verdict_errors))
for queue in statistics.queues:
    say("queue", queue.queue_num, "accepted", queue.verdicts[Verdict.ACCEPT])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
    say("after:", signal.getsignal(number))
"""

PROCESSES = [pytest.param(True, id="processes"), pytest.param(False, id="threads")]


class Handled(NamedTuple):
    """A packet that a worker has been given."""

    queue_num: int
    pid: int
    thread: int
    cpus: str
    word: str


class Team:
    """A program that serves queues."""

    def __init__(self, program: Program, numbers: list[int], fifo: Path, ready: str) -> None:
        self.program = program
        self.numbers = numbers
        self.fifo = fifo
        program.wait_for(ready)

    @property
    def pid(self) -> int:
        return self.program.process.pid

    @property
    def handled(self) -> list[Handled]:
        lines = [line.split() for line in self.program.output.splitlines()]
        return [
            Handled(int(words[1]), int(words[2]), int(words[3]), words[4], words[5])
            for words in lines
            if words[:1] == ["packet"]
        ]

    def children(self) -> list[int]:
        return children(self.pid)

    def worker(self) -> int:
        """The process of the only worker."""
        (pid,) = self.children()
        return pid

    def deliver_together(self, pid: int, flow: UdpFlow, *payloads: bytes) -> None:
        """Let one read of a process bring all of these packets: not the one that it waits in,
        which ends with the first packet that comes."""
        wait_until(lambda: reads_packets(pid))
        self.halt(pid)
        flow.send(b"first", *payloads)
        os.kill(pid, signal.SIGCONT)
        assert flow.receive() == b"first"

    def halt(self, pid: int) -> None:
        """Halt a process that waits."""
        wait_until(lambda: state(pid) == "S")
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: state(pid) == "T")

    def go_on(self) -> None:
        """End a handler's wait."""
        with self.fifo.open("w"):
            pass

    def end(self, number: int = signal.SIGTERM) -> str:
        """End the program by a signal, as it should; return its output."""
        self.program.process.send_signal(number)
        return self.program.run()


def reads_packets(pid: int) -> bool:
    """Whether a thread of the process is in a system call on a netlink socket of netfilter's."""
    with Path(f"/proc/{pid}/net/netlink").open(encoding="ascii") as table:
        rows = [line.split() for line in table]
    sockets = {f"socket:[{row[-1]}]" for row in rows if row[1] == str(NETLINK_NETFILTER)}
    descriptors = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has been closed meanwhile
            if str(path.readlink()) in sockets:
                descriptors.add(hex(int(path.name)))
    for path in Path(f"/proc/{pid}/task").glob("*/syscall"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            if descriptors & set(path.read_text(encoding="ascii").split()[1:2]):
                return True
    return False


def state(pid: int) -> str:
    """A process's state as a letter, Z where it is no more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):  # the latter between opening and reading
        return "Z"
    return stat.rpartition(")")[2].split()[0]


def children(pid: int) -> list[int]:
    """The processes that a process's main thread has started and that it has not waited for."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return list(map(int, text.split()))


def has_ended(pid: int) -> bool:
    return state(pid) in "ZX"


def first_of(queue_num: int) -> int:
    """The first number of a range that no other test uses."""
    return 30000 + 8 * (queue_num % 4000)


def filtered(
    traffic: Traffic, rules: Callable[..., Rule], number: int, *, bypass: bool = False
) -> UdpFlow:
    made = traffic.udp()
    rules("INPUT", "-p", "udp", "--dport", made.port, queue=number, bypass=bypass)
    return made


def spread(rules: Callable[..., Rule], port: int, team: Team, *options: str) -> None:
    balance = f"{team.numbers[0]}:{team.numbers[-1]}"
    target = ("-j", "NFQUEUE", "--queue-balance", balance, *options)
    rules("INPUT", "-p", "udp", "--dport", port, *target)


def start_team(
    run_program: Callable[..., Program],
    queue_num: int,
    directory: Path,
    count: int = 1,
    *,
    begin: str = "",
    ready: str = "workers serve",
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Team:
    """Serve `count` queues, the first of them `first_of(queue_num)`, in a program.

    `begin`: what it does first; `ready`: what it says when it is; `settings`: of the module.
    """
    numbers = [first_of(queue_num) + place for place in range(count)]
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    argument = json.dumps([numbers, str(fifo), begin, settings or {}, options])
    return Team(run_program(PROGRAM, argument), numbers, fifo, ready)

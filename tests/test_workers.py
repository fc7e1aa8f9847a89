"""Workers: every queue served and pinned, crashes survived, ends clean. On the real kernel."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from netfilterqueue import NetfilterQueue, Packet, workers
from netfilterqueue.workers import QueueStatistics, Statistics, serve
from support import (
    RECEIVE_BUFFER,
    TIMEOUT,
    Program,
    bound_queues,
    in_thread,
    wait_until,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Node, Rule
    from support import Traffic, UdpFlow

# What a datagram says is done; whatever says nothing is accepted.
PROGRAM = f"""
import json, logging, os, signal, sys, threading
from netfilterqueue import Verdict, workers

numbers, fifo, settings, options = json.loads(sys.argv[1])
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

    def __init__(self, program: Program, numbers: list[int], fifo: Path) -> None:
        self.program = program
        self.numbers = numbers
        self.fifo = fifo
        program.wait_for("workers serve")

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
        """Let one read of a process bring all of these packets."""
        wait_until(lambda: state(pid) == "S")
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: state(pid) == "T")
        flow.send(*payloads)
        os.kill(pid, signal.SIGCONT)

    def go_on(self) -> None:
        """End a handler's wait."""
        with self.fifo.open("w"):
            pass

    def end(self, number: int = signal.SIGTERM) -> str:
        """End the program by a signal, as it should; return its output."""
        self.program.process.send_signal(number)
        return self.program.run()


def state(pid: int) -> str:
    """A process's state as a letter, Z where it is no more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
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


@pytest.fixture
def team(
    run_program: Callable[..., Program], queue_num: int, tmp_path: Path
) -> Callable[..., Team]:
    """Serve `count` queues, the first of them `first_of(queue_num)`, in a program."""

    def start(count: int = 1, *, settings: dict[str, Any] | None = None, **options: Any) -> Team:
        numbers = [first_of(queue_num) + place for place in range(count)]
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        argument = json.dumps([numbers, str(fifo), settings or {}, options])
        return Team(run_program(PROGRAM, argument), numbers, fifo)

    return start


@pytest.fixture
def flow(traffic: Traffic, rules: Callable[..., Rule], queue_num: int) -> UdpFlow:
    """Datagrams to the first queue of a `team`."""
    return filtered(traffic, rules, first_of(queue_num))


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


class TestEveryQueueHasAWorker:
    @pytest.mark.parametrize("processes", PROCESSES)
    def test_of_its_own_on_a_cpu_of_its_own(
        self,
        team: Callable[..., Team],
        traffic: Traffic,
        rules: Callable[..., Rule],
        processes: bool,
    ) -> None:
        served = team(3, processes=processes)
        flows = [filtered(traffic, rules, number) for number in served.numbers]
        for one in flows:
            one.send(b"a", b"b")
            assert one.receive_all(2) == [b"a", b"b"]
        served.end()
        cpus = sorted(os.sched_getaffinity(0))
        for place, number in enumerate(served.numbers):
            mine = [handled for handled in served.handled if handled.queue_num == number]
            assert [handled.word for handled in mine] == ["a", "b"]
            assert {handled.cpus for handled in mine} == {str(cpus[place % len(cpus)])}
        assert len({handled.thread for handled in served.handled}) == 3
        assert len({handled.pid for handled in served.handled}) == (3 if processes else 1)
        assert (served.pid in {handled.pid for handled in served.handled}) is not processes

    def test_with_a_rule_that_balances_connections(
        self, team: Callable[..., Team], traffic: Traffic, rules: Callable[..., Rule]
    ) -> None:
        served = team(2)
        receiver = traffic.udp()
        spread(rules, receiver.port, served)
        # The rule chooses by the two addresses.
        for host in range(1, 65):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind((f"127.0.0.{host}", 0))
                sender.sendto(b"hello", ("127.0.0.1", receiver.port))
        receiver.receive_all(64)
        served.end()
        counts = Counter(handled.queue_num for handled in served.handled)
        assert sorted(counts) == served.numbers
        assert sum(counts.values()) == 64

    @pytest.mark.skipif(os.sched_getaffinity(0) < {0, 1}, reason="needs the CPUs 0 and 1")
    def test_on_the_cpu_whose_packets_a_fanout_rule_gives_it(
        self, team: Callable[..., Team], traffic: Traffic, rules: Callable[..., Rule]
    ) -> None:
        served = team(2)
        receiver = traffic.udp()
        spread(rules, receiver.port, served, "--queue-cpu-fanout")

        def send_from(cpu: int) -> None:
            os.sched_setaffinity(0, {cpu})  # of this thread
            receiver.send(b"from %d" % cpu)

        for cpu in (0, 1, 0):
            in_thread(send_from, cpu).result(TIMEOUT)
            assert receiver.receive() == b"from %d" % cpu
        served.end()
        assert [handled.cpus for handled in served.handled] == ["0", "1", "0"]

    def test_cpus_are_those_that_the_program_may_use(
        self, team: Callable[..., Team], traffic: Traffic, rules: Callable[..., Rule]
    ) -> None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(before)})
        try:
            served = team(2)
        finally:
            os.sched_setaffinity(0, before)
        for number in served.numbers:
            filtered(traffic, rules, number).send(b"hello")
        wait_until(lambda: not any(row.depth for row in bound_queues().values()))
        served.end()
        assert {handled.cpus for handled in served.handled} == {str(max(before))}
        assert len(served.handled) == 2


class TestCrashedWorkerIsRestarted:
    @pytest.mark.parametrize(
        ("order", "how"),
        [
            (b"raise", "ended with exit status 1"),
            (b"exit 0", "ended with exit status 0"),
            (b"exit 3", "ended with exit status 3"),
            (b"kill %d" % signal.SIGKILL, "was killed by signal 9 (Killed)"),
            (b"kill %d" % signal.SIGUSR1, "was killed by signal 10 (User defined signal 1)"),
        ],
    )
    def test_process(
        self, team: Callable[..., Team], flow: UdpFlow, order: bytes, how: str
    ) -> None:
        served = team(batch=1)
        first = served.worker()
        flow.send(order, b"after")
        assert flow.receive() == b"after"
        assert served.worker() != first
        output = served.end()
        assert (
            f"netfilterqueue.workers WARNING the worker of queue {served.numbers[0]} {how}; it is "
            "restarted (1 of at most 5 times within 60 seconds)\n"
        ) in output
        assert ("ValueError: told to" in output) is (order == b"raise")
        assert "1 restarts" in output

    def test_thread(self, team: Callable[..., Team], flow: UdpFlow) -> None:
        served = team(processes=False)
        flow.send(b"raise", b"after")
        assert flow.receive() == b"after"
        output = served.end()
        assert (
            f"of queue {served.numbers[0]} raised ValueError('told to'); it is restarted" in output
        )
        before, after = served.handled
        assert before.thread != after.thread
        assert before.cpus == after.cpus

    def test_process_that_somebody_else_ends(
        self, team: Callable[..., Team], flow: UdpFlow
    ) -> None:
        served = team(batch=1)
        first = served.worker()
        os.kill(first, signal.SIGTERM)
        wait_until(lambda: has_ended(first))
        flow.send(b"hello")
        assert flow.receive() == b"hello"
        assert "1 restarts" in served.end()

    def test_others_go_on(
        self, team: Callable[..., Team], flow: UdpFlow, traffic: Traffic, rules: Callable[..., Rule]
    ) -> None:
        served = team(2, batch=1)
        other = filtered(traffic, rules, served.numbers[1])
        children = served.children()
        other.send(b"1")
        flow.send(b"exit 1", b"after")
        assert flow.receive() == b"after"
        other.send(b"2")
        assert other.receive_all(2) == [b"1", b"2"]
        assert len(set(children) & set(served.children())) == 1
        served.end()

    def test_but_not_when_that_is_not_wanted(
        self, team: Callable[..., Team], flow: UdpFlow
    ) -> None:
        served = team(2, restart=False)
        children = served.children()
        flow.send(b"exit 3")
        assert served.program.wait() == 9
        number = served.numbers[0]
        assert (
            f"crashed: the worker of queue {number} ended with exit status 3; the others were ended"
        ) in served.program.output
        assert not bound_queues()
        assert all(map(has_ended, children))

    @pytest.mark.parametrize("processes", PROCESSES)
    def test_but_not_without_end(
        self, team: Callable[..., Team], flow: UdpFlow, processes: bool
    ) -> None:
        served = team(2, processes=processes, batch=1)
        flow.send(*[b"raise"] * 7)
        assert served.program.wait() == 9
        output = served.program.output
        assert "crash number 6 within 60 seconds; the others were ended" in output
        assert "5 restarts" in output
        assert f"cause: {None if processes else ValueError('told to')!r}" in output
        assert [handled.word for handled in served.handled] == ["raise"] * 6
        assert not bound_queues()
        assert all(has_ended(handled.pid) for handled in served.handled)

    def test_again_and_again_with_time_between(
        self, team: Callable[..., Team], flow: UdpFlow
    ) -> None:
        served = team(settings={"PERIOD": 0}, batch=1)
        for _ in range(8):
            flow.send(b"exit 1", b"after")
            assert flow.receive() == b"after"
        assert "8 restarts" in served.end()

    def test_with_the_signals_of_a_fresh_process(
        self, team: Callable[..., Team], flow: UdpFlow
    ) -> None:
        served = team(batch=1)
        flow.send(b"exit 1", b"signals")
        assert flow.receive() == b"signals"
        assert "signals True -1 set()\n" in served.end()


class TestPacketsOfACrashedWorker:
    @pytest.mark.parametrize("bypass", [False, True], ids=["", "queue-bypass"])
    def test_wait_until_it_is_restarted(
        self,
        team: Callable[..., Team],
        traffic: Traffic,
        rules: Callable[..., Rule],
        bypass: bool,
    ) -> None:
        served = team()
        (number,) = served.numbers
        flow = filtered(traffic, rules, number, bypass=bypass)
        worker = served.worker()
        os.kill(served.pid, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: has_ended(worker))
        flow.send(b"1", b"2")
        assert bound_queues()[number].depth == 2
        assert not flow.arrived()
        os.kill(served.pid, signal.SIGCONT)
        assert flow.receive_all(2) == [b"1", b"2"]
        served.end()
        assert [handled.word for handled in served.handled] == ["1", "2"]

    @pytest.mark.parametrize("bypass", [False, True], ids=["", "queue-bypass"])
    def test_are_dropped_if_it_had_read_them(
        self,
        team: Callable[..., Team],
        traffic: Traffic,
        rules: Callable[..., Rule],
        bypass: bool,
    ) -> None:
        served = team()
        (number,) = served.numbers
        flow = filtered(traffic, rules, number, bypass=bypass)
        first = served.worker()
        flow.send(b"hold")
        served.program.wait_for("hold")
        served.deliver_together(first, flow, b"exit 1", b"read with it")
        wait_until(lambda: has_ended(first))
        wait_until_queued(number, 3)
        flow.send(b"after")
        assert flow.receive() == b"after"
        wait_until_queued(number, 0)
        assert not flow.arrived()
        served.end()
        assert [handled.word for handled in served.handled] == ["hold", "exit", "after"]

    def test_that_a_thread_had_read_with_the_bad_one_are_not_lost(
        self, team: Callable[..., Team], flow: UdpFlow
    ) -> None:
        served = team(processes=False)
        flow.send(b"hold")
        served.program.wait_for("hold")
        served.deliver_together(served.pid, flow, b"raise", b"1", b"2")
        assert flow.receive_all(2) == [b"1", b"2"]
        # The bad one is dropped; the held one is still the handler's.
        wait_until_queued(served.numbers[0], 1)
        served.end()

    @pytest.mark.parametrize("bypass", [False, True], ids=["", "queue-bypass"])
    def test_that_is_not_restarted_meet_a_rule_without_a_listener(
        self,
        team: Callable[..., Team],
        traffic: Traffic,
        rules: Callable[..., Rule],
        bypass: bool,
    ) -> None:
        served = team(restart=False)
        flow = filtered(traffic, rules, served.numbers[0], bypass=bypass)
        flow.send(b"exit 1")
        assert served.program.wait() == 9
        flow.send(b"after")
        # Over loopback a datagram has arrived when it is sent.
        assert flow.arrived() == ([b"after"] if bypass else [])


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("processes", PROCESSES)
    def test_by_a_signal(
        self, team: Callable[..., Team], flow: UdpFlow, processes: bool, number: signal.Signals
    ) -> None:
        served = team(2, processes=processes)
        children = served.children()
        assert len(children) == (2 if processes else 0)
        flow.send(b"hello")
        assert flow.receive() == b"hello"
        output = served.end(number)
        assert "statistics: 1 packets in 2 queues, 0 dropped, 0 undecided, 0 restarts" in output
        assert "WARNING" not in output
        assert "ERROR" not in output
        assert not bound_queues()
        assert all(map(has_ended, children))
        handlers = [line for line in output.splitlines() if line.startswith("after:")]
        assert "default_int_handler" in handlers[0]
        assert all(str(signal.SIG_DFL) in line for line in handlers[1:])

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_by_a_signal_to_all_processes(
        self, team: Callable[..., Team], number: signal.Signals
    ) -> None:
        """As a terminal does by Ctrl-C, and a service manager."""
        served = team(3)
        os.killpg(served.pid, number)
        output = served.program.run()
        assert "0 restarts" in output
        assert "WARNING" not in output
        assert "Traceback" not in output

    def test_before_the_first_packet_of_a_restarted_worker(
        self, team: Callable[..., Team], flow: UdpFlow
    ) -> None:
        served = team()
        flow.send(b"exit 1")
        served.program.wait_for("it is restarted")
        output = served.end()
        assert "1 restarts" in output
        assert "ERROR" not in output

    @pytest.mark.parametrize("processes", PROCESSES)
    def test_sends_pending_verdicts_after_the_packet_at_hand(
        self, team: Callable[..., Team], flow: UdpFlow, processes: bool
    ) -> None:
        served = team(processes=processes, verdict_delay=3600)
        flow.send(b"0")
        assert flow.receive() == b"0"
        pid = served.worker() if processes else served.pid
        served.deliver_together(pid, flow, b"1", b"2", b"wait", b"not any more")
        served.program.wait_for("wait")
        assert not flow.arrived()
        served.program.process.send_signal(signal.SIGTERM)
        served.program.wait_for("1 workers were told to end")
        served.go_on()
        output = served.program.run()
        assert flow.arrived() == [b"1", b"2"]
        assert "statistics: 3 packets in 1 queues, 0 dropped, 2 undecided" in output

    @pytest.mark.parametrize("processes", PROCESSES)
    def test_does_not_wait_for_ever_for_a_handler(
        self, team: Callable[..., Team], flow: UdpFlow, processes: bool
    ) -> None:
        served = team(2, processes=processes, settings={"GRACE": 0.1})
        flow.send(b"wait")
        served.program.wait_for(" wait")
        output = served.end()
        assert f"ERROR nfqueue-{served.numbers[0]} has not ended within 0.1 seconds" in output
        assert not bound_queues()

    @pytest.mark.parametrize("busy", [False, True], ids=["idle", "in the handler"])
    def test_of_the_program_by_force_ends_its_workers(
        self, team: Callable[..., Team], flow: UdpFlow, busy: bool
    ) -> None:
        served = team(2)
        children = served.children()
        if busy:
            flow.send(b"wait")
            served.program.wait_for(" wait")
        served.program.process.kill()
        served.program.process.wait(TIMEOUT)
        wait_until(lambda: all(map(has_ended, children)))
        wait_until(lambda: not bound_queues())


class TestArguments:
    @pytest.mark.parametrize("processes", PROCESSES)
    def test_taken_number_is_told_and_nothing_keeps_running(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        processes: bool,
    ) -> None:
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        before = threading.active_count(), children(os.getpid())
        numbers = [queue_num + 1000, queue_num]
        with pytest.raises(OSError, match=f"queue {queue_num}: the number is taken by port id"):
            serve(Packet.accept, numbers, processes=processes, sock_len=RECEIVE_BUFFER)
        assert list(bound_queues()) == [queue_num]
        assert (threading.active_count(), children(os.getpid())) == before

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((None, [1]), {}, TypeError, "handler must be callable"),
            ((print, []), {}, ValueError, "no queue to serve"),
            ((print, [1, 2, 1]), {}, ValueError, r"there twice: \[1, 2, 1\]"),
            ((print, [1, 65536]), {}, ValueError, "queue number is 65536"),
            ((print, [1, "2"]), {}, TypeError, "queue number must be an integer"),
            ((print, 1), {}, TypeError, "not iterable"),
            ((print, [1, 2]), {"max_len": 0}, ValueError, "max_len is 0"),
            ((print, [1, 2]), {"max_length": 1}, TypeError, "max_length"),
            ((print, [1, 2]), {"callback": print}, TypeError, "callback"),
            ((print, [1, 2]), {"user_callback": print}, TypeError, "user_callback"),
        ],
    )
    @pytest.mark.parametrize("processes", PROCESSES)
    def test_are_checked_before_anything_starts(
        self,
        router: Node,
        arguments: tuple[Any, Any],
        options: dict[str, Any],
        error: type[Exception],
        message: str,
        processes: bool,
    ) -> None:
        handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(error, match=message):
            serve(*arguments, processes=processes, **options)
        assert not bound_queues()
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers

    def test_it_runs_in_the_main_thread_only(self) -> None:
        with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="the main thread"):
            pool.submit(serve, print, [1]).result(TIMEOUT)


class TestStatistics:
    @pytest.mark.parametrize("processes", PROCESSES)
    def test_are_summed_and_per_queue(
        self,
        team: Callable[..., Team],
        flow: UdpFlow,
        traffic: Traffic,
        rules: Callable[..., Rule],
        processes: bool,
    ) -> None:
        served = team(2, processes=processes, max_len=2, batch=1)
        other = filtered(traffic, rules, served.numbers[1])
        flow.send(b"raise", b"1")
        assert flow.receive() == b"1"
        other.send(b"hold", b"hold")
        wait_until_queued(served.numbers[1], 2)
        other.send(b"no room")
        assert served.end()
        assert "statistics: 2 packets in 2 queues, 1 dropped, 2 undecided, 1 restarts" in (
            served.program.output
        )

    def test_say_so_where_the_kernel_does_not_show_its_numbers(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(workers, "KERNEL_QUEUES", tmp_path / "none")
        assert workers.kernel_rows() == {}
        assert "the statistics lack the kernel's numbers" in caplog.text

    def test_of_queues_add_up(self) -> None:
        both = Statistics((QueueStatistics(1, 10, 2, 3, 4), QueueStatistics(2, 100, 20, 30, 40)))
        assert (both.packets, both.dropped, both.undecided, both.restarts) == (110, 22, 33, 44)

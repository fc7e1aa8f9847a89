"""Workers: every queue served and pinned, crashes survived, ends clean. On the real kernel."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict, workers
from netfilterqueue.workers import QueueStatistics, Statistics, serve
from support import (
    RECEIVE_BUFFER,
    TIMEOUT,
    bound_queues,
    in_thread,
    wait_until,
    wait_until_queued,
)
from teams import PROCESSES, children, filtered, first_of, has_ended, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Node, Rule
    from support import Traffic, UdpFlow
    from teams import Team


@pytest.fixture
def alone() -> None:
    """The threads of earlier tests have ended: serve() warns of any."""
    wait_until(lambda: threading.active_count() == 1)


@pytest.fixture
def flow(traffic: Traffic, rules: Callable[..., Rule], queue_num: int) -> UdpFlow:
    """Datagrams to the first queue of a `team`."""
    return filtered(traffic, rules, first_of(queue_num))


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

    @pytest.mark.skipif(not os.sched_getaffinity(0) >= {0, 1}, reason="needs the CPUs 0 and 1")
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

    @pytest.mark.parametrize("processes", PROCESSES)
    def test_by_a_signal_where_a_thousand_files_are_open(
        self, team: Callable[..., Team], processes: bool
    ) -> None:
        begin = (
            "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (2048, 2048)); "
            "[os.dup(0) for _ in range(1024)]"
        )
        assert "2 queues, 0 dropped" in team(2, processes=processes, begin=begin).end()

    def test_by_a_signal_that_has_ended_the_workers_first(self, team: Callable[..., Team]) -> None:
        served = team(3)
        children = served.children()
        served.halt(served.pid)
        os.killpg(served.pid, signal.SIGTERM)
        wait_until(lambda: all(map(has_ended, children)))
        os.kill(served.pid, signal.SIGCONT)
        output = served.program.run()
        assert "0 restarts" in output
        assert "WARNING" not in output

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
        assert "statistics: 4 packets in 1 queues, 0 dropped, 2 undecided" in output

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


@pytest.mark.usefixtures("alone", "router")
@pytest.mark.parametrize("processes", PROCESSES)
def test_worker_that_cannot_be_started_ends_the_others(
    queue_num: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    processes: bool,
) -> None:
    owner, name = (os, "fork") if processes else (threading.Thread, "start")
    start = getattr(owner, name)
    starts = []
    before = children(os.getpid())

    def refuse_the_second(*arguments: object) -> object:
        starts.append(arguments)
        if len(starts) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start(*arguments)

    monkeypatch.setattr(owner, name, refuse_the_second)
    numbers = [first_of(queue_num) + place for place in range(3)]
    with pytest.raises(BlockingIOError):
        serve(Packet.accept, numbers, processes=processes, sock_len=RECEIVE_BUFFER)
    assert len(starts) == 2
    assert "has not ended" not in caplog.text
    assert children(os.getpid()) == before
    assert not bound_queues()
    wait_until(lambda: threading.active_count() == 1)


@pytest.mark.usefixtures("alone")
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
            ((asyncio.sleep, [1]), {}, TypeError, "handler is a coroutine function"),
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

    def test_forks_with_other_threads_are_warned_of(self, router: Node) -> None:
        end = threading.Event()
        running = in_thread(end.wait)
        with pytest.raises(RuntimeWarning, match="forks while other threads run"):
            serve(print, [1])
        end.set()
        assert running.result(TIMEOUT)

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
        # Never more than there is room for.
        for receiver, word in ((flow, b"raise"), (other, b"drop")):
            for payloads in ((b"before",), (word, b"after")):
                receiver.send(*payloads)
                assert receiver.receive() == payloads[-1]
        other.send(b"hold", b"hold")
        wait_until_queued(served.numbers[1], 2)
        other.send(b"no room")
        output = served.end()
        # A process leaves the packet at hand behind, and its successor has it dropped; a thread
        # gives it a verdict itself.
        dropped = 1 if processes else 2
        assert (
            "statistics: 6 packets in 2 queues, 1 dropped, 2 undecided, 1 restarts; "
            f"verdicts: {dropped} DROP, 4 ACCEPT"
        ) in output
        assert f"queue {served.numbers[0]} accepted 2" in output
        assert f"queue {served.numbers[1]} accepted 2" in output

    @pytest.mark.parametrize(
        ("order", "told"), [(b"raise", 2), (b"exit 1", 1), (b"kill %d" % signal.SIGKILL, 1)]
    )
    def test_lack_the_verdicts_of_a_process_that_had_no_time_to_tell(
        self, team: Callable[..., Team], flow: UdpFlow, order: bytes, told: int
    ) -> None:
        served = team(batch=1)
        flow.send(b"before", order, b"after")
        assert flow.receive_all(2) == [b"before", b"after"]
        output = served.end()
        assert f"1 restarts; verdicts: {told} ACCEPT\n" in output
        # The kernel has counted all.
        assert "statistics: 3 packets in 1 queues" in output

    @pytest.mark.parametrize("processes", PROCESSES)
    def test_have_the_verdicts_that_the_kernel_refused(
        self, team: Callable[..., Team], flow: UdpFlow, router: Node, processes: bool
    ) -> None:
        served = team(processes=processes)
        flow.send(b"wait")
        served.program.wait_for(" wait")
        # Which empties every queue of the namespace.
        router.run(
            ["nft", "add table ip t; add chain ip t c { type filter hook input priority 9; }"]
        )
        router.run(["nft", "delete table ip t"])
        wait_until_queued(served.numbers[0], 0)
        served.go_on()
        flow.send(b"release", b"after")
        assert flow.receive_all(2) == [b"release", b"after"]
        assert f"refused {{{errno.ENOENT}: 1}}" in served.end()

    def test_say_so_where_the_kernel_does_not_show_its_numbers(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse() -> None:
            raise PermissionError("for root only")

        monkeypatch.setattr(workers, "kernel_queues", refuse)
        assert workers.statistics_of([]) == Statistics(())
        assert "the statistics lack the kernel's numbers: for root only" in caplog.text

    def test_of_queues_add_up(self) -> None:
        verdicts = Counter({Verdict.ACCEPT: 4, Verdict.DROP: 5})
        one = QueueStatistics(1, 10, 2, 3, 4, verdicts, Counter({errno.ENOENT: 6}))
        other = QueueStatistics(2, 100, 20, 30, 40, verdicts, Counter({errno.EPERM: 7}))
        both = Statistics((one, other))
        assert (both.packets, both.dropped, both.undecided, both.restarts) == (110, 22, 33, 44)
        assert both.verdicts == {Verdict.ACCEPT: 8, Verdict.DROP: 10}
        assert both.verdict_errors == {errno.ENOENT: 6, errno.EPERM: 7}

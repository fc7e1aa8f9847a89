"""Workers that crash: restarted or not, and what becomes of their packets."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from support import bound_queues, numbered, wait_until, wait_until_queued
from teams import PROCESSES, filtered, first_of, has_ended

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Rule
    from support import Traffic, UdpFlow
    from teams import Team

# Binds like any other, only that packets have time to come before the kernel's last answer.
BEGIN_SLOWLY = """
class Slow(workers.InheritedQueue):
    def bind(self, *arguments, **options):
        super().bind(*arguments, **options)
        say("asking")
        open(fifo).close()
        self.set_max_len(1024)

workers.InheritedQueue = Slow
"""


@pytest.fixture
def flow(traffic: Traffic, rules: Callable[..., Rule], queue_num: int) -> UdpFlow:
    """Datagrams to the first queue of a `team`."""
    return filtered(traffic, rules, first_of(queue_num))


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


by_rule_and_flag = pytest.mark.parametrize(
    ("bypass", "fail_open"),
    [(False, False), (True, False), (False, True)],
    ids=["", "queue-bypass", "fail_open"],
)


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
        served.halt(served.pid)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: has_ended(worker))
        flow.send(b"1", b"2")
        assert bound_queues()[number].depth == 2
        assert not flow.arrived()
        os.kill(served.pid, signal.SIGCONT)
        assert flow.receive_all(2) == [b"1", b"2"]
        served.end()
        assert [handled.word for handled in served.handled] == ["1", "2"]

    def test_that_find_the_queue_full_pass_with_fail_open(
        self, team: Callable[..., Team], flow: UdpFlow
    ) -> None:
        served = team(max_len=2, fail_open=True)
        worker = served.worker()
        served.halt(served.pid)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: has_ended(worker))
        flow.send(*numbered(5))
        assert flow.arrived() == [b"2", b"3", b"4"]
        os.kill(served.pid, signal.SIGCONT)
        assert flow.receive_all(2) == [b"0", b"1"]
        served.end()

    @by_rule_and_flag
    def test_are_dropped_if_it_had_read_them(
        self,
        team: Callable[..., Team],
        traffic: Traffic,
        rules: Callable[..., Rule],
        bypass: bool,
        fail_open: bool,
    ) -> None:
        served = team(fail_open=fail_open)
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
        assert [handled.word for handled in served.handled] == ["hold", "first", "exit", "after"]

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

    def test_that_came_while_the_queue_was_being_bound_do_not_stay_for_ever(
        self, team: Callable[..., Team], flow: UdpFlow
    ) -> None:
        """What is read with the kernel's answer to a request, the process has that asked."""
        served = team(begin=BEGIN_SLOWLY, ready="asking")
        (number,) = served.numbers
        flow.send(b"1", b"2")
        wait_until_queued(number, 2)
        served.go_on()
        served.program.wait_for("workers serve")
        flow.send(b"after")
        assert flow.receive() == b"after"
        wait_until_queued(number, 0)
        assert not flow.arrived()
        served.end()
        assert [handled.word for handled in served.handled] == ["after"]

    @by_rule_and_flag
    def test_that_is_not_restarted_meet_a_rule_without_a_listener(
        self,
        team: Callable[..., Team],
        traffic: Traffic,
        rules: Callable[..., Rule],
        bypass: bool,
        fail_open: bool,
    ) -> None:
        served = team(restart=False, fail_open=fail_open)
        flow = filtered(traffic, rules, served.numbers[0], bypass=bypass)
        flow.send(b"exit 1")
        assert served.program.wait() == 9
        flow.send(b"after")
        # Over loopback a datagram has arrived when it is sent.
        assert flow.arrived() == ([b"after"] if bypass else [])

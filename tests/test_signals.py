"""Signals: handled promptly wherever the loop is, by Python's threads only."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import os
import random
import signal
import socket
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import greenlet
import pytest

from netfilterqueue import NetfilterQueue, Packet, lowlevel
from support import (
    RECEIVE_BUFFER,
    SOON,
    START_TIMEOUT,
    TIMEOUT,
    QueuedUdp,
    alarm,
    bound_queues,
    in_thread,
    wait_until,
    wait_until_blocked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support import Program, UdpFlow

PROMPTLY = 1.0  # seconds; a signal that waits for the next packet waits for ever
TRIES = 500

PROGRAM = """
import sys, time
from netfilterqueue import NetfilterQueue
{preparation}
queue = NetfilterQueue()
queue.bind(int(sys.argv[1]), {callback}, sock_len=65536)
try:
    print("fd", queue.fileno(), "bound", flush=True)
    {run}
except KeyboardInterrupt:
    print("interrupted")
queue.unbind()
"""

# How the loop is run, and a callback in Python; the other is in C and never looks at signals.
LOOPS = {
    "run": "queue.run()",
    "run_socket": "queue.run_socket(socket.socket(fileno=os.dup(queue.fileno())))",
}
CALLBACKS = {
    "python": ("", "lambda packet: packet.accept()"),
    "c": ("import netfilterqueue", "netfilterqueue.Packet.accept"),
    "c, nothing decided": ("import collections", "collections.deque(maxlen=100).append"),
}


class Flood:
    """Traffic without end, from another thread of the tests' process."""

    def __init__(self, flow: UdpFlow) -> None:
        self.ended = threading.Event()
        self.sending = in_thread(self.send, flow)

    def send(self, flow: UdpFlow) -> None:
        while not self.ended.is_set():
            with contextlib.suppress(OSError):  # the queue is full, or not bound any more
                flow.send(*[b"flood"] * 50)

    def end(self) -> None:
        self.ended.set()
        self.sending.result(TIMEOUT)


@pytest.fixture
def flood() -> Iterator[Callable[[UdpFlow], Flood]]:
    with contextlib.ExitStack() as stack:

        def start(flow: UdpFlow) -> Flood:
            flood = Flood(flow)
            stack.callback(flood.end)
            return flood

        yield start


class TestCtrlC:
    @pytest.fixture
    def program(
        self, run_program: Callable[..., Program], queue_num: int
    ) -> Callable[[str, str], Program]:
        def start(loop: str, callback: str) -> Program:
            preparation, callback_text = CALLBACKS[callback]
            source = PROGRAM.format(
                preparation=f"import os, socket\n{preparation}",
                callback=callback_text,
                run=LOOPS[loop],
            )
            program = run_program(source, str(queue_num))
            program.wait_for("bound\n")
            return program

        return start

    @pytest.mark.parametrize("loop", LOOPS)
    def test_while_idle(
        self, program: Callable[[str, str], Program], queue_num: int, loop: str
    ) -> None:
        running = program(loop, "python")
        descriptor = int(running.output.split()[1])
        # run_socket reads a duplicate.
        wait_until_blocked(descriptor + (loop == "run_socket"), pid=running.process.pid)
        start = time.monotonic()
        running.interrupt()
        assert running.run().endswith("interrupted\n")
        assert time.monotonic() - start < PROMPTLY
        assert not bound_queues()

    @pytest.mark.parametrize("callback", CALLBACKS)
    @pytest.mark.parametrize("loop", LOOPS)
    def test_under_load(
        self,
        program: Callable[[str, str], Program],
        queued: Callable[..., UdpFlow],
        flood: Callable[[UdpFlow], Flood],
        loop: str,
        callback: str,
    ) -> None:
        running = program(loop, callback)
        flow = queued()
        flooding = flood(flow)
        if "nothing" not in callback:
            flow.receive_all(200)
        start = time.monotonic()
        running.interrupt()
        assert running.run().endswith("interrupted\n")
        assert time.monotonic() - start < PROMPTLY
        assert not flooding.sending.done()

    def test_in_the_callback(
        self, run_program: Callable[..., Program], queued: Callable[..., UdpFlow], queue_num: int
    ) -> None:
        flow = queued()
        program = run_program(
            PROGRAM.format(
                preparation="""
def callback(packet):
    try:
        print("called", flush=True)
        time.sleep(60)
    finally:
        packet.accept()
""",
                callback="callback",
                run="queue.run()",
            ),
            str(queue_num),
        )
        program.wait_for("bound\n")
        flow.send(b"hello")
        program.wait_for("called")
        program.interrupt()
        assert program.run().endswith("interrupted\n")
        assert flow.receive() == b"hello"

    def test_nothing_that_runs_is_python(
        self, run_program: Callable[..., Program], queue_num: int
    ) -> None:
        """Neither recv() nor the callback is, and recv() never waits."""
        program = run_program(
            PROGRAM.format(
                preparation="""
import collections, itertools, types
no_packet = (16).to_bytes(4, sys.byteorder) + bytes(12)
for_ever = collections.defaultdict(itertools.repeat(no_packet).__next__).__getitem__
""",
                callback="print",
                run="queue.run_socket(types.SimpleNamespace(recv=for_ever))",
            ),
            str(queue_num),
        )
        program.wait_for("bound\n")
        program.interrupt()
        assert program.run().endswith("interrupted\n")


class HandlerError(Exception):
    pass


class TestHandlers:
    """In the main thread, which is the one that handles signals, while it runs the queue."""

    @pytest.mark.parametrize("loaded", [False, True], ids=["idle", "under load"])
    def test_error_of_a_handler_names_run(
        self, queued_udp: Callable[..., QueuedUdp], flood: Callable[..., Flood], loaded: bool
    ) -> None:
        def fail(*_: object) -> None:
            raise HandlerError

        udp = queued_udp(callback=Packet.accept)
        load = flood(udp.flow) if loaded else None
        with alarm(SOON, fail), pytest.raises(HandlerError) as caught:
            udp.queue.run()
        if load is not None:
            load.end()
        functions = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert any("NetfilterQueue.run" in name for name in functions)
        # It has lost nothing.
        udp.queue.run(block=False)

    def test_error_of_a_handler_leaves_run_socket(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def fail(*_: object) -> None:
            raise HandlerError

        udp = queued_udp(callback=Packet.accept)
        with socket.socket(fileno=os.dup(udp.queue.fileno())) as same_socket:
            with alarm(SOON, fail), pytest.raises(HandlerError) as caught:
                udp.queue.run_socket(same_socket)
        functions = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert any("NetfilterQueue.run_socket" in name for name in functions)

    def test_handler_that_returns_leaves_the_loop_running(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        """As for every call of Python's own (PEP 475)."""
        handled = threading.Event()

        def stop_soon(packet: Packet) -> None:
            packet.accept()
            udp.queue.stop()

        def send_when_handled() -> None:
            assert handled.wait(TIMEOUT)
            udp.flow.send(b"later")

        udp = queued_udp(callback=stop_soon)
        sending = in_thread(send_when_handled)
        with alarm(SOON, lambda *_: handled.set()):
            udp.queue.run()
        sending.result(TIMEOUT)
        assert udp.flow.receive() == b"later"

    @pytest.mark.parametrize("timeout", [None, 2 * PROMPTLY], ids=["without end", "for a while"])
    def test_handler_of_a_signal_at_any_moment_is_called_soon(
        self, queue: NetfilterQueue, queue_num: int, timeout: float | None
    ) -> None:
        """Between the last look for signals and the wait, too: some of these tries meet it."""
        dice = random.Random(1)
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        for _ in range(TRIES):
            start = time.monotonic()
            with alarm(dice.uniform(1e-6, 4e-5), lambda *_: queue.stop()):
                queue.run(timeout=timeout)
            assert time.monotonic() - start < PROMPTLY

    @pytest.mark.parametrize("end", ["stop", "unbind", "close"])
    @pytest.mark.parametrize("loop", ["run", "run_socket"])
    def test_handler_ends_the_idle_loop(
        self, queue: NetfilterQueue, queue_num: int, loop: str, end: str
    ) -> None:
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        with socket.socket(fileno=os.dup(queue.fileno())) as same_socket:
            arguments = [same_socket] if loop == "run_socket" else []
            with alarm(SOON, lambda *_: getattr(queue, end)()):
                assert getattr(queue, loop)(*arguments) is None
        assert (queue_num in bound_queues()) == (end == "stop")

    @pytest.mark.parametrize("end", ["stop", "unbind", "close"])
    def test_handler_ends_the_loop_under_load(
        self, queued_udp: Callable[..., QueuedUdp], flood: Callable[..., Flood], end: str
    ) -> None:
        def accept(packet: Packet) -> None:
            # The handler may run before this line: then it is too late.
            with contextlib.suppress(RuntimeError):
                packet.accept()

        udp = queued_udp(callback=accept)
        flood(udp.flow)
        with alarm(SOON, lambda *_: getattr(udp.queue, end)()):
            udp.queue.run()
        assert bool(bound_queues()) == (end == "stop")

    def test_handler_binds_anew(self, queued_udp: Callable[..., QueuedUdp], queue_num: int) -> None:
        """The loop was that of the earlier binding: it ends."""
        udp = queued_udp()
        new: list[Packet] = []

        def bind_anew(*_: object) -> None:
            udp.queue.unbind()
            udp.queue.bind(queue_num, new.append, sock_len=RECEIVE_BUFFER)
            udp.flow.send(b"new")

        with alarm(SOON, bind_anew):
            udp.queue.run()
        while not new:
            udp.queue.run(block=False)
        assert udp.packets == []
        new[0].accept()
        assert udp.flow.receive() == b"new"

    def test_handler_decides_a_packet(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp()
        packet = udp.deliver_one(b"hello")

        def decide(*_: object) -> None:
            packet.accept()
            udp.queue.stop()

        with alarm(SOON, decide):
            udp.queue.run()
        assert udp.flow.receive() == b"hello"

    def test_error_of_a_handler_loses_no_read_of_which_others_are_told(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        """Who asks the kernel is told when the loop has read: the answer may be in that."""
        running = False

        def fail(*_: object) -> None:
            nonlocal running
            if running:
                running = False
                raise HandlerError

        def set_lengths() -> None:
            while not sending.done():
                udp.queue.set_max_len(100000)

        def send() -> None:
            for number in range(1, 20001):
                udp.flow.send(b"read")
                if not number % 100:
                    wait_until(lambda number=number: len(kept) == number)  # type: ignore[misc]

        udp = queued_udp()
        udp.queue.unbind()
        # In C: a handler that raises within the callback would keep a packet from it.
        kept: collections.deque[Packet] = collections.deque()
        udp.queue.bind(queue_num, kept.append, max_len=100000, sock_len=RECEIVE_BUFFER)
        # Callbacks of the collector are Python, and what a handler raises there leaves nothing.
        gc.disable()
        sending = in_thread(send)
        asking = in_thread(set_lengths)
        try:
            with alarm(0.001, fail, 0.0002):
                while not sending.done():
                    with contextlib.suppress(HandlerError):
                        running = True
                        udp.queue.run(timeout=SOON)
                        running = False
        finally:
            gc.enable()
        sending.result()
        asking.result(TIMEOUT)

    def test_stop_in_a_handler_between_two_runs_ends_the_next(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        with alarm(60, lambda *_: queue.stop()):
            os.kill(os.getpid(), signal.SIGALRM)
            queue.run()

    def test_callback_in_c_does_not_defer_a_handler(
        self, queued_udp: Callable[..., QueuedUdp], flood: Callable[..., Flood], queue_num: int
    ) -> None:
        def fail(*_: object) -> None:
            raise HandlerError

        udp = queued_udp()
        udp.queue.unbind()
        kept: collections.deque[Packet] = collections.deque(maxlen=10)
        udp.queue.bind(queue_num, kept.append, max_len=100000, sock_len=RECEIVE_BUFFER)
        flood(udp.flow)
        with alarm(SOON, fail), pytest.raises(HandlerError):
            udp.queue.run()


class TestWakeupDescriptor:
    """run() has Python write signals to a pipe of its own: the program's must not notice."""

    @pytest.fixture
    def own(self) -> Iterator[tuple[int, int]]:
        """A pipe of the program's, as asyncio has one: its ends, the second in use."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        assert signal.set_wakeup_fd(writer) == -1
        try:
            yield reader, writer
        finally:
            signal.set_wakeup_fd(-1)
            os.close(reader)
            os.close(writer)

    def test_is_as_before(
        self, own: tuple[int, int], queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        for descriptor in (own[1], -1):
            signal.set_wakeup_fd(descriptor)
            queue.run(timeout=0.001)
            assert signal.set_wakeup_fd(-1) == descriptor

    @pytest.mark.parametrize("arrived", [False, True], ids=["while it waits", "in the callback"])
    def test_gets_what_arrives(
        self, own: tuple[int, int], queued_udp: Callable[..., QueuedUdp], arrived: bool
    ) -> None:
        def decide(packet: Packet) -> None:
            packet.accept()
            if arrived:
                os.kill(os.getpid(), signal.SIGALRM)

        udp = queued_udp(callback=decide)
        if arrived:
            in_thread(send_when_blocked, udp)
        with alarm(60 if arrived else SOON, lambda *_: udp.queue.stop()):
            udp.queue.run()
        assert os.read(own[0], 10) == bytes([signal.SIGALRM])

    def test_stays_if_the_callback_sets_it(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

        def decide(packet: Packet) -> None:
            packet.accept()
            signal.set_wakeup_fd(writer)
            udp.queue.stop()

        udp = queued_udp(callback=decide)
        in_thread(send_when_blocked, udp)
        udp.queue.run()
        assert signal.set_wakeup_fd(-1) == writer
        os.close(reader)
        os.close(writer)

    def test_is_as_before_when_greenlets_end_in_another_order_than_they_began(
        self,
        own: tuple[int, int],
        queued_udp: Callable[..., QueuedUdp],
        queued: Callable[..., UdpFlow],
        queue_num: int,
    ) -> None:
        def change_over(packet: Packet) -> None:
            packet.accept()
            first.queue.stop()
            two.switch()

        def change_back(packet: Packet) -> None:
            packet.accept()
            one.switch()

        first = queued_udp(callback=change_over)
        with NetfilterQueue() as other:
            flow = queued(number=queue_num + 1)
            other.bind(queue_num + 1, change_back, sock_len=RECEIVE_BUFFER)
            one, two = (greenlet.greenlet(queue.run) for queue in (first.queue, other))
            for udp in (first, QueuedUdp(flow, other, [])):
                in_thread(send_when_blocked, udp)
            one.switch()
            assert one.dead
            in_use = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(in_use)
            assert in_use != own[1]
            with alarm(SOON, lambda *_: other.stop()):
                two.switch()
        assert two.dead
        assert os.read(own[0], 10) == bytes([signal.SIGALRM])
        assert signal.set_wakeup_fd(-1) == own[1]

    @pytest.mark.usefixtures("own")
    @pytest.mark.parametrize("end", ["stop", "close"])
    def test_is_in_a_child_as_without_a_queue(
        self, queued_udp: Callable[..., QueuedUdp], end: str
    ) -> None:
        """The program's; or none, where asyncio has been imported (since Python 3.12)."""
        expected = wakeup_descriptor_of_a_child()
        found: list[int] = []

        def fork(packet: Packet) -> None:
            packet.accept()
            getattr(udp.queue, end)()
            found.append(wakeup_descriptor_of_a_child())

        udp = queued_udp(callback=fork)
        in_thread(send_when_blocked, udp)
        udp.queue.run()
        assert found == [expected]


def wakeup_descriptor_of_a_child() -> int:
    """The number, 255 for none."""
    child = os.fork()
    if not child:
        os._exit(signal.set_wakeup_fd(-1) & 0xFF)
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status)


def test_nothing_is_sent_to_what_has_the_number_of_a_closed_queue(
    queued_udp: Callable[..., QueuedUdp], queue_num: int
) -> None:
    """Closed while another queue runs in its callback."""

    def run_another(packet: Packet) -> None:
        packet.accept()
        descriptor = udp.queue.fileno()
        ours, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with NetfilterQueue() as inner:
            inner.bind(queue_num + 1, print, sock_len=RECEIVE_BUFFER)

            def end_both(*_: object) -> None:
                udp.queue.close()
                inner.stop()

            with alarm(SOON, end_both):
                inner.run()
        with ours, other, socket.socket(fileno=os.dup2(other.fileno(), descriptor)):
            with alarm(60, lambda *_: None):
                os.kill(os.getpid(), signal.SIGALRM)
            ours.settimeout(SOON)
            with contextlib.suppress(TimeoutError, socket.timeout):
                received.append(ours.recv(100))

    received: list[bytes] = []
    udp = queued_udp(callback=run_another)
    in_thread(send_when_blocked, udp)
    udp.queue.run()
    assert received == []


def bound_queue(queue_num: int) -> NetfilterQueue:
    queue = NetfilterQueue()
    queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
    return queue


def handle_with_queues(queue_num: int) -> lowlevel.NetfilterQueueHandle:
    handle = lowlevel.open()
    for number in (queue_num, queue_num + 1000):
        handle.create_queue(number, print)
    return handle


def close_queue(queue: Any, *_: object) -> None:
    queue.close()


@pytest.mark.parametrize(
    ("make", "end"),
    [
        (bound_queue, NetfilterQueue.unbind),
        (bound_queue, NetfilterQueue.close),
        (handle_with_queues, lowlevel.NetfilterQueueHandle.close),
    ],
    ids=["unbind", "close", "lowlevel"],
)
def test_handler_may_close_what_is_just_being_given_up(
    queue_num: int, make: Callable[[int], Any], end: Callable[[Any], object]
) -> None:
    """And with it the socket from which the kernel's answer is to be read."""
    dice = random.Random(0)
    for _ in range(4 * TRIES):
        with contextlib.closing(make(queue_num)) as ending:
            with alarm(dice.uniform(1e-6, 5e-5), functools.partial(close_queue, ending)):
                end(ending)
    assert not bound_queues()


CLOSING_PROGRAM = """
import contextlib, os, pathlib, signal, sys, time
from netfilterqueue import NetfilterQueue

def watchers():
    names = []
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has ended
            names.append(path.read_text())
    return names.count("nfqueue-signals\\n")

def run_for(timeout):
    with NetfilterQueue() as queue:
        queue.bind(int(sys.argv[1]), print, sock_len=65536)
        queue.run(timeout=timeout)

run_for(0.001)
assert watchers() == 1
os.closerange(3, 1000)
while watchers():
    time.sleep(0.001)
signal.setitimer(signal.ITIMER_REAL, 0.01)
signal.signal(signal.SIGALRM, signal.default_int_handler)
try:
    run_for(None)
except KeyboardInterrupt:
    print("interrupted")
assert watchers() == 1
"""


def test_pipe_that_the_program_has_closed_is_replaced(
    run_program: Callable[..., Program], queue_num: int
) -> None:
    """As daemons do, which close all that they do not know."""
    program = run_program(CLOSING_PROGRAM, str(queue_num))
    assert program.run() == "interrupted\n"


SUBINTERPRETER_PROGRAM = """
import sys, _testcapi

status = _testcapi.run_in_subinterp('''
import sys, threading
from netfilterqueue import NetfilterQueue
with NetfilterQueue() as queue:
    queue.bind(%s, print, sock_len=65536)
    threading.Timer(0.01, queue.stop).start()
    queue.run()
''' % sys.argv[1])
assert status == 0
"""


def test_subinterpreter_handles_none(run_program: Callable[..., Program], queue_num: int) -> None:
    """There, Python lets nobody ask for their numbers."""
    pytest.importorskip("_testcapi")
    assert run_program(SUBINTERPRETER_PROGRAM, str(queue_num)).run() == ""


GREENLETS_PROGRAM = """
import gevent.monkey
gevent.monkey.patch_all()
import os, signal, sys
from netfilterqueue import NetfilterQueue

with NetfilterQueue() as queue:
    queue.bind(int(sys.argv[1]), print, sock_len=65536)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    def handler(*_):
        in_use = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(in_use)
        assert in_use not in (-1, writer)
        queue.stop()
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.set_wakeup_fd(writer)
    queue.run()
    assert signal.set_wakeup_fd(-1) == writer
"""


def test_main_thread_is_known_although_gevent_numbers_greenlets(
    run_program: Callable[..., Program], queue_num: int
) -> None:
    assert run_program(GREENLETS_PROGRAM, str(queue_num)).run(START_TIMEOUT) == ""


def send_when_blocked(udp: QueuedUdp) -> None:
    wait_until_blocked(udp.queue.fileno())
    udp.flow.send(b"hello")

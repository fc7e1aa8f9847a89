"""Threads: any of them decides, stops, unbinds, binds and closes while others run the queue."""

from __future__ import annotations

import contextlib
import os
import queue as queues
import random
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet
from support import RECEIVE_BUFFER, TIMEOUT, bound_queues, in_thread, wait_until, wait_until_blocked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from support import QueuedUdp, UdpFlow

# How many steps the random interleavings take.
INTERLEAVINGS = int(os.environ.get("NETFILTERQUEUE_TEST_INTERLEAVINGS", "400"))
# Seconds for one step, on the busiest machine: what takes longer waits for ever.
WATCHDOG = 10.0

WAYS_TO_END = ["stop", "unbind", "close"]


def accept_while_bound(packet: Packet) -> None:
    """For callbacks: another thread can unbind the queue when the packet has just been read."""
    with contextlib.suppress(RuntimeError):
        packet.accept()


def run_if_bound(queue: NetfilterQueue) -> None:
    """For threads: the queue's end can come before one of them has begun to run it."""
    try:
        queue.run()
    except (RuntimeError, ValueError) as error:
        if "no queue is bound" not in str(error) and "queue is closed" not in str(error):
            raise


def numbered(count: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in range(count)]


@pytest.fixture
def load(queued: Callable[..., UdpFlow]) -> Iterator[UdpFlow]:
    """UDP traffic to the queue that never ceases, from a thread of its own."""
    flow = queued()
    ended = threading.Event()

    def send() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):  # EPERM: dropped, as the queue is not bound
                flow.send(b"load")

    sending = in_thread(send)
    yield flow
    ended.set()
    sending.result(TIMEOUT)


class TestVerdicts:
    def test_another_thread_decides_while_the_queue_runs(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp()
        running = in_thread(udp.queue.run)
        payloads = numbered(50)
        udp.flow.send(*payloads)
        wait_until(lambda: len(udp.packets) == 50)
        for packet in udp.packets:
            packet.accept()
        assert udp.flow.receive_all(50) == payloads
        udp.queue.stop()
        assert running.result(TIMEOUT) is None

    @pytest.mark.parametrize("verdict_delay", [0, 0.001, 60])
    def test_verdicts_of_one_thread_keep_their_order(
        self, queued_udp: Callable[..., QueuedUdp], verdict_delay: float
    ) -> None:
        udp = queued_udp(callback=Packet.retain, verdict_delay=verdict_delay)
        packets = udp.deliver(*numbered(100))
        random.Random(1).shuffle(packets)

        def decide() -> None:
            for packet in packets:
                packet.accept()

        in_thread(decide).result(TIMEOUT)
        order = [packet.get_payload()[-4:] for packet in packets]
        assert udp.flow.receive_all(100) == order

    def test_verdicts_of_several_threads_keep_the_order_given(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        decided: list[bytes] = []
        one_at_a_time = threading.Lock()
        waiting: queues.SimpleQueue[Packet | None] = queues.SimpleQueue()

        def put(packet: Packet) -> None:
            packet.retain()
            waiting.put(packet)

        def decide() -> None:
            while (packet := waiting.get()) is not None:
                with one_at_a_time:
                    decided.append(packet.get_payload()[-4:])
                    packet.accept()

        udp = queued_udp(callback=put)
        running = in_thread(udp.queue.run)
        workers = [in_thread(decide) for _ in range(4)]
        udp.flow.send(*numbered(200))
        arrived = udp.flow.receive_all(200)
        for _ in workers:
            waiting.put(None)
        for worker in workers:
            worker.result(TIMEOUT)
        assert arrived == decided
        assert sorted(arrived) == numbered(200)
        udp.queue.stop()
        running.result(TIMEOUT)

    def test_of_threads_that_decide_the_same_packet_one_succeeds(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp()
        packets = udp.deliver(*numbered(100))
        together = threading.Barrier(3)

        def decide() -> int:
            succeeded = 0
            together.wait(TIMEOUT)
            for packet in packets:
                with contextlib.suppress(RuntimeError):
                    packet.accept()
                    succeeded += 1
            return succeeded

        deciders = [in_thread(decide) for _ in range(3)]
        assert sum(decider.result(TIMEOUT) for decider in deciders) == 100
        assert sorted(udp.flow.receive_all(100)) == numbered(100)

    def test_verdicts_race_with_unbind(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        """Each verdict is either given or refused, and none is for a packet of the next binding."""
        udp = queued_udp()
        for _ in range(20):
            packets = udp.deliver(*numbered(20))
            together = threading.Barrier(2)

            def decide(packets: list[Packet] = packets, together: Any = together) -> int:
                given = 0
                together.wait(TIMEOUT)
                for packet in packets:
                    with contextlib.suppress(RuntimeError):
                        packet.accept()
                        given += 1
                return given

            deciding = in_thread(decide)
            together.wait(TIMEOUT)
            udp.queue.unbind()
            udp.queue.bind(queue_num, udp.packets.append, sock_len=RECEIVE_BUFFER)
            given = deciding.result(TIMEOUT)
            assert [packet.verdict is None for packet in packets].count(False) == given
            assert udp.flow.receive_all(given) == numbered(given)
            assert udp.flow.arrived() == []


class TestEnds:
    """`stop`, `unbind` and `close` end what other threads run, idle or under load."""

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("end", WAYS_TO_END)
    def test_idle(self, queue: NetfilterQueue, queue_num: int, end: str, threads: int) -> None:
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        running = [in_thread(queue.run) for _ in range(threads)]
        wait_until_blocked(queue.fileno(), threads)
        getattr(queue, end)()
        for runner in running:
            assert runner.result(TIMEOUT) is None
        assert (queue_num in bound_queues()) == (end == "stop")

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("end", WAYS_TO_END)
    def test_under_load(self, load: UdpFlow, queue_num: int, end: str, threads: int) -> None:
        for _ in range(5):
            with NetfilterQueue() as queue:
                queue.bind(queue_num, accept_while_bound, sock_len=RECEIVE_BUFFER)
                running = [in_thread(run_if_bound, queue) for _ in range(threads)]
                load.receive()
                getattr(queue, end)()
                for runner in running:
                    assert runner.result(TIMEOUT) is None

    @pytest.mark.parametrize("end", WAYS_TO_END)
    def test_from_a_callback_of_one_of_several_runners(
        self, load: UdpFlow, queue_num: int, end: str
    ) -> None:
        with NetfilterQueue() as queue:
            ending = threading.Event()

            def end_it(packet: Packet) -> None:
                accept_while_bound(packet)
                if ending.is_set():
                    getattr(queue, end)()

            queue.bind(queue_num, end_it, sock_len=RECEIVE_BUFFER)
            running = [in_thread(run_if_bound, queue) for _ in range(3)]
            load.receive()
            ending.set()
            for runner in running:
                assert runner.result(TIMEOUT) is None

    @pytest.mark.parametrize("end", WAYS_TO_END)
    def test_several_at_once(self, load: UdpFlow, queue_num: int, end: str) -> None:
        with NetfilterQueue() as queue:
            queue.bind(queue_num, accept_while_bound, sock_len=RECEIVE_BUFFER)
            running = [in_thread(run_if_bound, queue) for _ in range(2)]
            load.receive()
            for ending in [in_thread(getattr(queue, end)) for _ in range(4)]:
                assert ending.result(TIMEOUT) is None
            for runner in running:
                assert runner.result(TIMEOUT) is None

    @pytest.mark.parametrize("threads", [1, 3])
    def test_queue_is_bound_anew_at_once(
        self, queue: NetfilterQueue, queue_num: int, threads: int
    ) -> None:
        """Who ran the earlier binding hears of its end, although nobody reads for the next one."""
        for _ in range(20):
            queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
            running = [in_thread(queue.run) for _ in range(threads)]
            wait_until_blocked(queue.fileno(), threads)
            queue.unbind()
            queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
            for runner in running:
                assert runner.result(TIMEOUT) is None
            queue.unbind()

    def test_close_while_others_decide(self, load: UdpFlow, queue_num: int) -> None:
        """The descriptor's number is free once it is closed: nothing may be sent to it then."""
        for _ in range(10):
            waiting: queues.SimpleQueue[Packet | None] = queues.SimpleQueue()

            def decide(waiting: queues.SimpleQueue[Packet | None] = waiting) -> None:
                while (packet := waiting.get()) is not None:
                    with contextlib.suppress(RuntimeError):
                        packet.accept()

            queue = NetfilterQueue()
            queue.bind(queue_num, waiting.put, sock_len=RECEIVE_BUFFER)
            deciding = [in_thread(decide) for _ in range(2)]
            running = in_thread(queue.run)
            load.receive()
            queue.close()
            assert running.result(TIMEOUT) is None
            for _ in deciding:
                waiting.put(None)
            for decider in deciding:
                assert decider.result(TIMEOUT) is None


class TestRuns:
    def test_many_queues_with_a_thread_each(self, queued: Callable[..., UdpFlow]) -> None:
        numbers = range(40000, 40020)
        flows = [queued(number=number) for number in numbers]
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(NetfilterQueue()) for _ in numbers]
            for queue, number in zip(opened, numbers):
                queue.bind(number, Packet.accept, sock_len=RECEIVE_BUFFER)
            running = [in_thread(queue.run) for queue in opened]
            for flow in flows:
                flow.send(*numbered(10))
            for flow in flows:
                assert flow.receive_all(10) == numbered(10)
            for queue in opened:
                queue.stop()
            for runner in running:
                assert runner.result(TIMEOUT) is None

    def test_several_threads_run_one_queue(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        """Each packet is delivered once."""
        udp = queued_udp(callback=Packet.accept)
        running = [in_thread(udp.queue.run) for _ in range(4)]
        for _ in range(4):
            udp.flow.send(*numbered(100))
            assert sorted(udp.flow.receive_all(100)) == numbered(100)
        assert len({packet.id for packet in udp.packets}) == len(udp.packets) == 400
        udp.queue.stop()
        for runner in running:
            assert runner.result(TIMEOUT) is None

    def test_error_in_one_of_several_runners_leaves_the_others(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def refuse_bad(packet: Packet) -> None:
            if packet.get_payload().endswith(b"bad"):
                raise ZeroDivisionError
            packet.accept()

        udp = queued_udp(callback=refuse_bad)
        running = [in_thread(udp.queue.run) for _ in range(3)]
        udp.flow.send(b"bad")
        wait_until(lambda: any(runner.done() for runner in running))
        udp.flow.send(b"good", b"good")
        assert udp.flow.receive_all(2) == [b"good"] * 2
        assert [runner.done() for runner in running].count(True) == 1
        udp.queue.stop()
        errors = [type(runner.exception(TIMEOUT)) for runner in running]
        assert sorted(errors, key=str) == [type(None)] * 2 + [ZeroDivisionError]


class Interleaving:
    """Does everything to one queue, at random, in several threads at once."""

    STEPS = ("bind", "unbind", "stop", "run", "run(False)", "decide", "pause")

    def __init__(self, queue: NetfilterQueue, queue_num: int) -> None:
        self.queue = queue
        self.queue_num = queue_num
        self.undecided: queues.SimpleQueue[Packet] = queues.SimpleQueue()
        self.running: list[Future[None]] = []

    def callback(self, packet: Packet) -> None:
        if packet.id % 5:
            packet.accept()
        else:
            self.undecided.put(packet)

    def take_steps(self, seed: int, count: int) -> None:
        dice = random.Random(seed)
        for _ in range(count):
            self.step(dice)

    def step(self, dice: random.Random) -> None:
        step = dice.choice(self.STEPS)
        # What is said where the queue is bound already, or not, and an empty list of packets.
        with contextlib.suppress(RuntimeError, queues.Empty):
            if step == "bind":
                batch = dice.choice((1, 2, 32))
                self.queue.bind(self.queue_num, self.callback, sock_len=RECEIVE_BUFFER, batch=batch)
            elif step == "unbind":
                self.queue.unbind()
            elif step == "stop":
                self.queue.stop()
            elif step == "run":
                self.running.append(in_thread(self.run))
            elif step == "run(False)":
                self.queue.run(block=False)
            elif step == "decide":
                self.undecided.get_nowait().accept()
            else:
                time.sleep(dice.random() * 0.002)

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.queue.run()

    def finish(self) -> None:
        for runner in self.running:
            # One that has yet to begin finds the queue unbound.
            self.queue.unbind()
            runner.result(WATCHDOG)


@pytest.mark.parametrize("seed", range(4))
def test_random_interleavings(
    load: UdpFlow, queue: NetfilterQueue, queue_num: int, seed: int
) -> None:
    interleaving = Interleaving(queue, queue_num)
    threads = 3
    count = INTERLEAVINGS // 4 // threads
    stepping = [
        in_thread(interleaving.take_steps, seed * threads + number, count)
        for number in range(threads)
    ]
    for thread in stepping:
        thread.result(WATCHDOG + count)
    interleaving.finish()
    # After all that the queue is as good as new.
    queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER)
    load.arrived()
    running = in_thread(queue.run)
    assert load.receive() == b"load"
    queue.stop()
    assert running.result(TIMEOUT) is None


@pytest.mark.parametrize("seed", range(4))
def test_stop_is_heard_at_every_moment(
    load: UdpFlow, queue: NetfilterQueue, queue_num: int, seed: int
) -> None:
    """Between any two steps of the loop: in a callback, while it sends, before it reads."""
    dice = random.Random(seed)
    queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER, batch=dice.choice((1, 4, 32)))
    for _ in range(INTERLEAVINGS // 4):
        running = in_thread(queue.run)
        time.sleep(dice.random() * 0.001)
        queue.stop()
        assert running.result(WATCHDOG) is None


@pytest.mark.parametrize("end", WAYS_TO_END)
def test_end_is_heard_although_nothing_follows(
    queued: Callable[..., UdpFlow], queue_num: int, end: str
) -> None:
    """No packet comes that would wake the loop in its place."""
    dice = random.Random(1)
    flow = queued()
    for _ in range(INTERLEAVINGS // 8):
        queue = NetfilterQueue()
        queue.bind(queue_num, accept_while_bound, sock_len=RECEIVE_BUFFER)
        running = in_thread(run_if_bound, queue)
        flow.send(b"1", b"2", b"3")
        time.sleep(dice.random() * 0.0005)
        getattr(queue, end)()
        assert running.result(WATCHDOG) is None
        queue.close()

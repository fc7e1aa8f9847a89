"""What threads do at the same moment with one queue, packet or handle.

Where there is no GIL they do so in earnest; where there is, they take turns often.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import queue as queues
import random
import sys
import sysconfig
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from netfilterqueue._handmade import packets_from
from netfilterqueue._lowlevel import handle_without_queues

from messages import NFQA, attribute, packet_header, simple_packets
from netfilterqueue import NetfilterQueue, Packet, Verdict, nflog
from netfilterqueue.lowlevel import NF_ACCEPT
from support import (
    LOG_PREFIX,
    RECEIVE_BUFFER,
    TIMEOUT,
    decode_one,
    in_thread,
    numbered,
    udp_data,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.lowlevel import NetfilterQueueData
    from support import Program, UdpFlow

FREE_THREADED = sys.version_info >= (3, 14) and sysconfig.get_config_var("Py_GIL_DISABLED")

WORKERS = 3
# Packets that a worker holds after it has decided them: more than one read brings.
HELD = 20


@pytest.fixture(autouse=True)
def frequent_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*functions: Callable[[], object]) -> None:
    """Call each in a thread of its own; the first error is raised."""
    ready = threading.Barrier(len(functions))

    def call(function: Callable[[], object]) -> None:
        ready.wait(TIMEOUT)
        function()

    for future in [in_thread(call, function) for function in functions]:
        future.result(4 * TIMEOUT)


class Hands:
    """Threads that hold what they are given for a while, and compare it with what it was."""

    def __init__(self, identify: Callable[[Any], bytes]) -> None:
        self.given: queues.SimpleQueue[Any] = queues.SimpleQueue()
        self.seen: list[bytes] = []
        self._identify = identify
        self._workers = [in_thread(self._work, number) for number in range(WORKERS)]

    def _work(self, seed: int) -> None:
        chance = random.Random(seed)
        held: collections.deque[tuple[Any, bytes]] = collections.deque()
        while (item := self.given.get()) is not None:
            held.append((item, self._identify(item)))
            self.seen.append(held[-1][1])
            while len(held) > chance.randrange(HELD):
                self._compare(*held.popleft())
            del item
        for item, content in held:
            self._compare(item, content)

    def _compare(self, item: Any, content: bytes) -> None:
        assert self._identify(item) == content

    def end(self) -> list[bytes]:
        """What each of the items was, in no order."""
        for _ in self._workers:
            self.given.put(None)
        for worker in self._workers:
            worker.result(TIMEOUT)
        return sorted(self.seen)


class TestQueue:
    def test_packets_outlive_their_read_in_the_hands_of_others(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        """The reader takes their memory away while they look at it, decide, and let go."""

        def identify(packet: Packet) -> bytes:
            if packet.verdict is None:
                packet.accept()
            view = memoryview(packet)
            content = udp_data(packet)
            assert bytes(view)[-len(content) :] == content
            return content

        flow = queued()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER, batch=8)
        hands = Hands(identify)

        def read() -> None:
            for packet in queue:
                hands.given.put(packet)

        reading = in_thread(read)
        payloads = numbered(1500)
        for first in range(0, len(payloads), 50):
            flow.send(*payloads[first : first + 50])
            flow.receive_all(50)
        queue.stop()
        reading.result(TIMEOUT)
        assert hands.end() == sorted(payloads)

    def test_packets_let_go_undecided_by_others_get_the_default_verdict(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        hands = Hands(udp_data)

        def keep(packet: Packet) -> None:
            packet.retain()
            hands.given.put(packet)

        queue.bind(queue_num, keep, sock_len=RECEIVE_BUFFER, default_verdict=Verdict.ACCEPT)
        running = in_thread(queue.run)
        payloads = numbered(200)
        flow.send(*payloads)
        wait_until(lambda: len(hands.seen) == len(payloads))
        assert hands.end() == sorted(payloads)
        queue.stop()
        # Without a GIL, this thread may be the one that collects them, when it next runs Python.
        running.result(TIMEOUT)
        assert sorted(flow.receive_all(len(payloads))) == sorted(payloads)
        assert queue.stats().abandoned == len(payloads)

    def test_everything_at_once(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, lambda packet: Verdict.ACCEPT, sock_len=RECEIVE_BUFFER)
        payloads = numbered(1000)

        def send() -> None:
            try:
                for first in range(0, len(payloads), 50):
                    flow.send(*payloads[first : first + 50])
                    assert sorted(flow.receive_all(50)) == sorted(payloads[first : first + 50])
            finally:
                done.set()

        def repeat(action: Callable[[], object]) -> Callable[[], None]:
            def until_done() -> None:
                while not done.is_set():
                    action()

            return until_done

        def watch() -> None:
            before = latest[0]
            latest[0] = queue.stats().packets
            assert before <= latest[0] <= len(payloads)

        def stop() -> None:
            queue.stop()
            # Each takes room in the receive buffer, which is for the packets, too.
            done.wait(0.001)

        done = threading.Event()
        latest = [0]
        at_once(
            send,
            repeat(lambda: queue.run(timeout=0.001)),
            repeat(lambda: queue.run(block=False)),
            repeat(watch),
            repeat(lambda: queue.set_max_len(4096)),
            repeat(stop),
        )
        queue.unbind()
        stats = queue.stats()
        assert stats.packets == stats.verdicts[Verdict.ACCEPT] == len(payloads)


class TestPacket:
    def test_payload_is_whole_while_others_replace_it(self) -> None:
        packet = decode_one(packet_header(), attribute(NFQA.PAYLOAD, b"x" * 100))

        def change(letter: bytes) -> None:
            # A new object each time, whose memory is free as soon as the packet has another.
            for length in range(1, 3001):
                packet.set_payload(letter * length)
                if not length % 3:
                    packet.retain()
                    packet.set_payload(None)

        def look() -> None:
            for _ in range(3000):
                for content in (packet.get_payload(), bytes(packet), bytes(memoryview(packet))):
                    assert content == content[:1] * len(content)
                assert 1 <= len(packet) <= 3000

        at_once(lambda: change(b"a"), lambda: change(b"b"), look, look)

    def test_changes_are_whole(self) -> None:
        packet = decode_one(packet_header(), attribute(NFQA.PAYLOAD, b"x"))

        def change(mark: int) -> None:
            for _ in range(1000):
                packet.set_mark(mark)
                packet.set_priority(mark)
                assert packet.get_mark() in (1, 0xFFFFFFFF)

        at_once(lambda: change(1), lambda: change(0xFFFFFFFF))
        packet.accept()

    def test_one_of_two_verdicts_is_given(self) -> None:
        packets, _ = packets_from(simple_packets(*range(3000)))
        given: list[tuple[int, Verdict]] = []
        reached = [0, 0]

        def decide(number: int, verdict: Verdict, method: Callable[[Packet], None]) -> None:
            for count, packet in enumerate(packets):
                # So that both come to it at the same moment; a barrier is far too slow.
                reached[number] = count
                while reached[1 - number] < count:
                    if not FREE_THREADED:
                        time.sleep(0)
                with contextlib.suppress(RuntimeError):
                    method(packet)
                    given.append((packet.id, verdict))
            reached[number] = len(packets)

        at_once(
            lambda: decide(0, Verdict.ACCEPT, Packet.accept),
            lambda: decide(1, Verdict.DROP, Packet.drop),
        )
        assert sorted(given) == [(packet.id, packet.verdict) for packet in packets]


class TestLowlevel:
    def test_datagrams_of_several_threads_are_handled_once_each(self) -> None:
        handled: list[bytes] = []

        def callback(data: NetfilterQueueData) -> None:
            handled.append(data.get_payload())
            data.set_verdict(NF_ACCEPT)

        handle = handle_without_queues({7: callback})
        datagrams = simple_packets(*range(1000), queue_num=7)

        def handle_some(first: int) -> None:
            for datagram in datagrams[first::WORKERS]:
                handle.handle_packet(datagram)

        at_once(*[functools.partial(handle_some, first) for first in range(WORKERS)])
        assert sorted(handled) == sorted(b"packet %d" % number for number in range(1000))


class TestLog:
    def test_messages_outlive_their_read_in_the_hands_of_others(
        self, group: int, logged: Callable[..., UdpFlow]
    ) -> None:
        def identify(data: nflog.NflogData) -> bytes:
            content = dict(data)
            assert content["prefix"] == LOG_PREFIX
            return bytes(content["payload"][28:])

        def read() -> None:
            for data in log:
                hands.given.put(data)

        flow = logged()
        hands = Hands(identify)
        payloads = numbered(1600)
        # Of the eight messages that the kernel sends together some are held, and some are not.
        with nflog.open(group, qthresh=8) as log:
            reading = in_thread(read)
            for first in range(0, len(payloads), 80):
                flow.send(*payloads[first : first + 80])
                flow.receive_all(80)
                wait_until(lambda count=first + 80: len(hands.seen) == count)  # type: ignore[misc]
            log.stop()
            reading.result(TIMEOUT)
        assert hands.end() == sorted(payloads)


@pytest.mark.skipif(not FREE_THREADED, reason="needs a free-threaded CPython, 3.14 or later")
def test_no_module_switches_the_gil_on(run_program: Callable[..., Program]) -> None:
    """Python warns when one does, which is an error in this program."""
    program = """
        import importlib, pkgutil, sys
        import netfilterqueue
        for module in pkgutil.iter_modules(netfilterqueue.__path__):
            if module.name != "_pytest_plugin":
                importlib.import_module(f"netfilterqueue.{module.name}")
        print(sys._is_gil_enabled())
    """
    assert run_program(program).run() == "False\n"

"""`await queue.aread()` and `async for packet in queue`, on asyncio and on trio."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest

from event_loops import OnAsyncio, OnTrio
from netfilterqueue import NetfilterQueue, Packet, aio
from support import (
    RECEIVE_BUFFER,
    SOON,
    TIMEOUT,
    alarm_when,
    awaiting,
    in_thread,
    numbered,
    readable,
    udp_data,
    wait_until,
    wait_until_blocked,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from event_loops import Loop
    from support import UdpFlow

# More than an asynchronous read goes through before it waits.
STEPS = 8


@pytest.fixture(params=[OnAsyncio, OnTrio])
def loop(request: pytest.FixtureRequest) -> Loop:
    made: Loop = request.param()
    return made


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


async def accept_all(queue: NetfilterQueue) -> list[bytes]:
    """Accept packets until the queue is stopped; return what they carried."""
    seen = []
    async for packet in queue:
        seen.append(udp_data(packet))
        packet.accept()
    return seen


async def aread_all(queue: NetfilterQueue) -> list[bytes]:
    seen = []
    while packets := await queue.aread():
        for packet in packets:
            seen.append(udp_data(packet))
            packet.accept()
    return seen


PULLS = {"async for": accept_all, "aread": aread_all}


@pytest.fixture(params=PULLS)
def pull(request: pytest.FixtureRequest) -> Callable[[NetfilterQueue], Awaitable[list[bytes]]]:
    """Accept packets until the queue is stopped, and return what they carried."""
    return PULLS[request.param]


class TestPackets:
    def test_those_pending_and_those_to_come_arrive_in_order(
        self,
        loop: Loop,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Awaitable[list[bytes]]],
    ) -> None:
        seen = []

        async def main() -> None:
            async def consume() -> None:
                seen.extend(await pull(queue))

            async def feed() -> None:
                for data in numbered(150)[100:]:
                    await loop.sleep(0.0005)
                    flow.send(data)
                await loop.until(lambda: queue.stats().packets == 150 and awaiting(queue) == 1)
                queue.stop()

            await loop.together(consume, feed)

        flow.send(*numbered(100))
        loop.run(main)
        assert seen == flow.arrived() == numbered(150)

    def test_aread_takes_a_count_and_leaves_the_rest(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        async def main() -> list[list[Packet]]:
            return [await queue.aread(count) for count in (2, 1, 100)]

        flow.send(*numbered(5))
        reads = [[udp_data(packet) for packet in packets] for packets in loop.run(main)]
        assert reads == [[b"0", b"1"], [b"2"], [b"3", b"4"]]

    @pytest.mark.parametrize("timeout", [0, SOON])
    def test_aread_is_empty_after_the_timeout(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow, timeout: float
    ) -> None:
        async def main() -> tuple[list[Packet], float]:
            start = time.monotonic()
            return await queue.aread(timeout=timeout), time.monotonic() - start

        packets, took = loop.run(main)
        assert packets == []
        assert timeout <= took < TIMEOUT

    def test_aread_with_a_timeout_returns_what_is_pending(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(b"hello")
        (packet,) = loop.run(lambda: queue.aread(timeout=0))
        assert udp_data(packet) == b"hello"

    def test_stop_while_aread_returns_packets_is_for_the_next(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else a loop that ends when there are none would go on."""
        wait_for_one = aio.wait_for_one

        async def take_one_and_stop(pulling: aio.Pulling, timeout: float) -> Packet | None:
            packet = await wait_for_one(pulling, timeout)
            queue.stop()
            return packet

        async def main() -> list[list[bytes]]:
            with monkeypatch.context() as patched:
                patched.setattr(aio, "wait_for_one", take_one_and_stop)
                reads = [await queue.aread()]
            reads += [await queue.aread(), await queue.aread()]
            return [[udp_data(packet) for packet in packets] for packets in reads]

        flow.send(*numbered(3))
        assert loop.run(main) == [[b"0"], [], [b"1", b"2"]]

    def test_break_leaves_the_rest_for_another_loop(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        async def main() -> list[bytes]:
            seen = []
            async for packet in queue:
                seen.append(udp_data(packet))
                break
            async for packet in queue:
                seen.append(udp_data(packet))
                if len(seen) == 3:
                    break
            return seen

        flow.send(*numbered(5))
        assert loop.run(main) == numbered(3)
        assert readable(queue), "event loops come back for the rest"
        assert [udp_data(packet) for packet in queue.read()] == [b"3", b"4"]

    def test_payload_lasts_as_long_as_the_packet(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        kept: list[Packet] = []

        async def main() -> None:
            async for packet in queue:
                kept.append(packet)
                if len(kept) == 300:
                    return

        def send() -> None:
            for data in numbered(300):
                flow.send(data)

        sending = in_thread(send)
        loop.run(main)
        sending.result(TIMEOUT)
        assert [udp_data(packet) for packet in kept] == numbered(300)

    @pytest.mark.parametrize("bound", [True, False])
    def test_of_a_queue_that_cannot_be_pulled_from_are_refused_at_the_call(
        self, queue: NetfilterQueue, queue_num: int, bound: bool
    ) -> None:
        if bound:
            queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER)
        for pull in (queue.__aiter__, queue.aread):
            with pytest.raises(RuntimeError, match=r"use run\(\)" if bound else r"call bind\(\)"):
                pull()


class TestTasks:
    def test_verdicts_come_from_tasks_in_any_order_and_none_holds_back_another(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        """The first packet's task ends last, when it has seen the others arrive."""
        arrived: list[bytes] = []

        async def decide(packet: Packet) -> None:
            if udp_data(packet) == b"0":
                while len(arrived) < 49:
                    arrived.extend(flow.arrived())
                    await loop.sleep(0.001)
            else:
                await loop.sleep(random.random() * 0.02)
            packet.accept()

        async def main() -> None:
            packets = []
            async for packet in queue:
                packets.append(packet)
                if len(packets) == 50:
                    break
            await loop.together(*(lambda packet=packet: decide(packet) for packet in packets))

        flow.send(*numbered(50))
        loop.run(main)
        assert sorted(arrived) == sorted(numbered(50)[1:])
        assert flow.receive() == b"0"

    def test_slow_task_leaves_the_packets_of_its_read_to_others(
        self, loop: Loop, queue: NetfilterQueue, queue_num: int, flow: UdpFlow
    ) -> None:
        """Both wait; the first to wake reads all packets, and is slow with its own."""
        seen: list[bytes] = []

        async def consume() -> None:
            async for packet in queue:
                seen.append(udp_data(packet))
                packet.accept()
                if len(seen) == 1:
                    while len(seen) < 8:
                        await loop.sleep(0.001)
                if len(seen) == 8:
                    queue.stop()

        async def feed() -> None:
            await loop.until(lambda: awaiting(queue) == 3)
            flow.send(*numbered(8))

        async def main() -> None:
            await loop.together(consume, consume, consume, feed)

        loop.run(main)
        assert sorted(seen) == sorted(flow.arrived()) == numbered(8)

    def test_each_packet_goes_to_one_of_several_tasks(
        self,
        loop: Loop,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Awaitable[list[bytes]]],
    ) -> None:
        seen: list[bytes] = []
        arrived: list[bytes] = []

        async def consume() -> None:
            seen.extend(await pull(queue))

        async def feed() -> None:
            for data in numbered(100):
                flow.send(data, data)
                await loop.sleep(0)
            while len(arrived) < 200:
                await loop.sleep(0.001)
                arrived.extend(flow.arrived())
            queue.stop()

        loop.run(lambda: loop.together(consume, consume, consume, feed))
        assert sorted(seen) == sorted(arrived) == sorted(numbered(100) * 2)

    def test_tasks_may_share_an_iterator(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        seen = []
        packets = queue.__aiter__()

        async def consume() -> None:
            async for packet in packets:
                seen.append(udp_data(packet))
                packet.accept()

        async def feed() -> None:
            await loop.until(lambda: awaiting(queue) == 2)
            flow.send(*numbered(5))
            await loop.until(lambda: len(seen) == 5 and awaiting(queue) == 2)
            queue.stop()

        loop.run(lambda: loop.together(consume, consume, feed))
        assert sorted(seen) == numbered(5)

    def test_flood_of_packets_does_not_shut_other_tasks_out(
        self,
        loop: Loop,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Awaitable[list[bytes]]],
    ) -> None:
        """There are packets whenever the loop looks, as long as the other task has had no turns."""
        ended = threading.Event()

        def flood() -> None:
            while not ended.is_set():
                flow.send(b"flood")

        async def count_turns() -> None:
            for _ in range(20):
                await loop.sleep(0)
            queue.stop()

        async def main() -> None:
            await loop.together(lambda: pull(queue), count_turns)

        flow.send(b"flood")
        flooding = [in_thread(flood) for _ in range(2)]
        try:
            loop.run(main)
        finally:
            ended.set()
            for sender in flooding:
                sender.result(TIMEOUT)

    def test_two_loops_in_two_threads(
        self,
        queue: NetfilterQueue,
        flow: UdpFlow,
        pull: Callable[[NetfilterQueue], Awaitable[list[bytes]]],
    ) -> None:
        running = [in_thread(loop.run, lambda: pull(queue)) for loop in (OnAsyncio(), OnTrio())]
        for _ in range(10):
            flow.send(*numbered(10))
            assert sorted(flow.receive_all(10)) == numbered(10)
        while not all(runner.done() for runner in running):
            # One that is between two reads does not hear a stop that ends the other's.
            queue.stop()
            time.sleep(0.001)
        seen = [data for runner in running for data in runner.result(TIMEOUT)]
        assert sorted(seen) == sorted(numbered(10) * 10)

    def test_reader_of_the_queues_own_descriptor_goes_on_beside_it(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        """An event loop has one reader for a descriptor: this must not be taken."""
        called = []

        async def until_taken(count: int) -> None:
            await OnAsyncio().until(lambda: queue.stats().packets == count and awaiting(queue) == 1)

        async def main() -> list[bytes]:
            running = asyncio.get_running_loop()
            running.add_reader(queue.fileno(), lambda: called.append(True))
            pulling = asyncio.ensure_future(accept_all(queue))
            for taken, data in enumerate(numbered(3)):
                await until_taken(taken)
                called.clear()
                flow.send(data)
                await OnAsyncio().until(lambda: called)
            await until_taken(3)
            queue.stop()
            seen = await pulling
            assert running.remove_reader(queue.fileno())
            return seen

        assert OnAsyncio().run(main) == numbered(3)


class TestCancelling:
    @pytest.mark.parametrize("steps", range(STEPS))
    @pytest.mark.parametrize("pending", [True, False], ids=["pending", "waiting"])
    def test_at_each_turn_loses_no_packet(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow, steps: int, pending: bool
    ) -> None:
        seen: list[Packet] = []

        async def iterate() -> None:
            async for packet in queue:
                seen.append(packet)  # noqa: PERF401 - it is cancelled, with what is there by then

        async def read() -> list[Packet]:
            return await queue.aread(count=2)

        async def main() -> None:
            seen.extend(await loop.cancelled(read, steps) or [])
            await loop.cancelled(iterate, steps)
            if not pending:
                flow.send(*numbered(5))
            while len(seen) < 5:
                seen.extend(await queue.aread())

        if pending:
            flow.send(*numbered(5))
        before = len(descriptors())
        loop.run(main)
        assert [udp_data(packet) for packet in seen] == numbered(5)
        assert len(descriptors()) == before

    def test_by_timeouts_under_traffic_loses_no_packet(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        seen: list[bytes] = []
        dice = random.Random(1)

        async def consume() -> None:
            while len(seen) < 200:
                packets = await loop.limited(queue.aread, dice.random() * 0.001)
                for packet in packets or []:
                    seen.append(udp_data(packet))
                    packet.accept()

        def send() -> None:
            for data in numbered(200):
                flow.send(data)
                time.sleep(dice.random() * 0.001)

        sending = in_thread(send)
        loop.run(consume)
        sending.result(TIMEOUT)
        assert seen == flow.receive_all(200) == numbered(200)

    def test_leaves_no_stop_for_the_next_loop(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        async def main() -> list[Packet]:
            await loop.cancelled(queue.aread, STEPS)
            queue.stop()
            assert await queue.aread() == [], "none was under way"
            flow.send(b"hello")
            return await queue.aread()

        assert [udp_data(packet) for packet in loop.run(main)] == [b"hello"]

    def test_awaitable_that_nobody_awaits_takes_nothing(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        flow.send(b"hello")

        def forget_to_await() -> None:
            queue.aread()  # type: ignore[unused-coroutine]
            gc.collect()

        with pytest.warns(RuntimeWarning, match="never awaited"):
            forget_to_await()
        assert [udp_data(packet) for packet in queue.read()] == [b"hello"]

    def test_iterator_that_is_abandoned_takes_nothing_with_it(
        self, loop: Loop, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        async def main() -> bytes:
            packets = queue.__aiter__()
            return udp_data(await packets.__anext__())

        flow.send(*numbered(3))
        before = len(descriptors())
        assert loop.run(main) == b"0"
        gc.collect()
        assert len(descriptors()) == before
        assert [udp_data(packet) for packet in queue.read()] == [b"1", b"2"]
        queue.stop()
        assert queue.read() == [], "no loop is under way that would have taken this"

    def test_loop_that_ends_with_a_task_that_waits_frees_everything(
        self, queue: NetfilterQueue, flow: UdpFlow
    ) -> None:
        before = len(descriptors())

        async def main() -> None:
            task = asyncio.ensure_future(accept_all(queue))
            await OnAsyncio().until(lambda: awaiting(queue) == 1)
            assert not task.done()

        OnAsyncio().run(main)
        gc.collect()
        assert len(descriptors()) == before


ENDS: dict[str, Callable[[NetfilterQueue], None]] = {
    "stop": NetfilterQueue.stop,
    "unbind": NetfilterQueue.unbind,
    "close": NetfilterQueue.close,
}


@pytest.fixture(params=ENDS)
def end(request: pytest.FixtureRequest) -> Callable[[NetfilterQueue], None]:
    return ENDS[request.param]


class TestEnds:
    """Nothing but the end wakes what waits: there is no traffic."""

    def test_heard_from_the_loop(
        self,
        loop: Loop,
        queue: NetfilterQueue,
        flow: UdpFlow,
        end: Callable[[NetfilterQueue], None],
    ) -> None:
        async def consume() -> None:
            assert await accept_all(queue) == []

        async def read() -> None:
            assert await queue.aread() == []

        async def end_soon() -> None:
            await loop.until(lambda: awaiting(queue) == 3)
            end(queue)

        loop.run(lambda: loop.together(consume, read, consume, end_soon))

    def test_heard_from_a_thread(
        self,
        loop: Loop,
        queue: NetfilterQueue,
        flow: UdpFlow,
        end: Callable[[NetfilterQueue], None],
        pull: Callable[[NetfilterQueue], Awaitable[list[bytes]]],
    ) -> None:
        def end_when_awaited() -> None:
            wait_until(lambda: awaiting(queue) == 1)
            end(queue)

        ending = in_thread(end_when_awaited)
        if end is NetfilterQueue.stop or pull is accept_all:
            assert loop.run(lambda: pull(queue)) == []
        else:
            assert loop.run(queue.aread) == []
        ending.result(TIMEOUT)

    def test_heard_from_a_signal_handler(
        self,
        loop: Loop,
        queue: NetfilterQueue,
        flow: UdpFlow,
        end: Callable[[NetfilterQueue], None],
    ) -> None:
        with alarm_when(lambda: awaiting(queue) == 1, lambda *_: end(queue)):
            assert loop.run(lambda: accept_all(queue)) == []

    def test_heard_by_all_although_the_queue_is_bound_again_at_once(
        self, loop: Loop, queue: NetfilterQueue, queue_num: int, flow: UdpFlow
    ) -> None:
        async def consume() -> None:
            assert await accept_all(queue) == []

        async def bind_again() -> None:
            await loop.until(lambda: awaiting(queue) == 2)
            queue.unbind()
            queue.bind(queue_num, sock_len=RECEIVE_BUFFER)

        loop.run(lambda: loop.together(consume, consume, bind_again))
        flow.send(b"hello")
        assert [udp_data(packet) for packet in queue.read()] == [b"hello"]

    def test_heard_by_a_thread_and_a_task_that_wait_both(
        self,
        loop: Loop,
        queue: NetfilterQueue,
        flow: UdpFlow,
        end: Callable[[NetfilterQueue], None],
    ) -> None:
        threads = [in_thread(queue.read), in_thread(list, iter(queue))]
        running = in_thread(loop.run, lambda: accept_all(queue))
        wait_until_blocked(queue.fileno(), 2)
        wait_until(lambda: awaiting(queue) == 1)
        end(queue)
        for waiter in (*threads, running):
            assert waiter.result(TIMEOUT) == []

    def test_in_the_body_ends_the_loop_after_the_packet_at_hand(
        self,
        loop: Loop,
        queue: NetfilterQueue,
        flow: UdpFlow,
        end: Callable[[NetfilterQueue], None],
    ) -> None:
        async def main() -> int:
            count = 0
            async for packet in queue:
                count += 1
                packet.accept()
                end(queue)
            return count

        flow.send(*numbered(3))
        assert loop.run(main) == 1
        assert flow.arrived() == [b"0"]

    def test_stop_before_it_ends_the_next_one(
        self, loop: Loop, queue: NetfilterQueue, queue_num: int, flow: UdpFlow
    ) -> None:
        flow.send(b"hello")
        wait_until_queued(queue_num, 1)
        queue.stop()
        assert loop.run(lambda: accept_all(queue)) == []
        assert len(queue.read()) == 1

    def test_verdicts_are_sent_before_it_waits(
        self, loop: Loop, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, verdict_delay=60, sock_len=RECEIVE_BUFFER)
        flow.send(b"accepted", b"held")
        held = []

        async def consume() -> None:
            async for packet in queue:
                held.append(packet)
                if len(held) == 1:
                    packet.accept()

        async def look() -> None:
            arrived: list[bytes] = []
            while not arrived:
                await loop.sleep(0.001)
                arrived = flow.arrived()
            assert arrived == [b"accepted"]
            queue.stop()

        loop.run(lambda: loop.together(consume, look))

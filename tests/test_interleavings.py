"""Thousands of starts, stops, binds and unbinds at once, at random, in every kind of loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import time
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import NetfilterQueue, Packet
from support import RECEIVE_BUFFER, TIMEOUT, in_thread, udp_data, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import UdpFlow

# Steps at random that each of the tests takes with all kinds of loop together.
STEPS = int(os.environ.get("NETFILTERQUEUE_TEST_INTERLEAVINGS", "12000"))
SEEDS = 2
# Seconds for one kind of loop, on the busiest machine: what takes longer waits for ever.
WATCHDOG = 60.0


def accept(packet: Packet) -> None:
    with contextlib.suppress(RuntimeError):  # the queue has been unbound meanwhile
        packet.accept()


class Run:
    """A kind of loop: how it is run, until the end, by a thread that runs nothing else."""

    callback: Callable[[Packet], None] | None = staticmethod(accept)

    def __init__(self, queue: NetfilterQueue) -> None:
        self.queue = queue

    def start(self) -> None:
        self.queue.run()

    def close(self) -> None:
        pass


class RunForAWhile(Run):
    def start(self) -> None:
        self.queue.run(timeout=WATCHDOG)


class RunSocket(Run):
    def __init__(self, queue: NetfilterQueue) -> None:
        super().__init__(queue)
        self.socket = socket.fromfd(queue.fileno(), socket.AF_NETLINK, socket.SOCK_RAW)

    def start(self) -> None:
        self.queue.run_socket(self.socket)

    def close(self) -> None:
        self.socket.close()


class Read(Run):
    callback = None

    def start(self) -> None:
        while packets := self.queue.read(count=2):
            for packet in packets:
                accept(packet)


class Iterate(Run):
    callback = None

    def start(self) -> None:
        for packet in self.queue:
            accept(packet)


class IterateOnAsyncio(Run):
    callback = None

    def __init__(self, queue: NetfilterQueue) -> None:
        super().__init__(queue)
        self.loop = asyncio.new_event_loop()

    def start(self) -> None:
        self.loop.run_until_complete(self.iterate())

    async def iterate(self) -> None:
        async for packet in self.queue:
            accept(packet)

    def close(self) -> None:
        self.loop.close()


class ReadOnAsyncio(IterateOnAsyncio):
    async def iterate(self) -> None:
        while packets := await self.queue.aread():
            for packet in packets:
                accept(packet)


KINDS = [Run, RunForAWhile, RunSocket, Read, Iterate, IterateOnAsyncio, ReadOnAsyncio]


def bind(queue: NetfilterQueue, queue_num: int, kind: type[Run], batch: int = 32) -> None:
    with contextlib.suppress(RuntimeError):  # it is bound
        queue.bind(queue_num, kind.callback, batch=batch, sock_len=RECEIVE_BUFFER)


def send(flow: UdpFlow) -> None:
    with contextlib.suppress(OSError):  # EPERM: dropped, as the queue is not bound
        flow.send(b"packet")


class Interleaving:
    """Two threads at one queue. Only the second binds, so that it knows what must end a loop."""

    def __init__(self, kind: type[Run], queue: NetfilterQueue, queue_num: int) -> None:
        self.kind = kind
        self.queue = queue
        self.queue_num = queue_num
        self.returned = 0  # loops
        self.ran = 0  # loops that had a queue bound
        self.ended = False

    def run_again_and_again(self, seed: int) -> None:
        dice = random.Random(seed)
        with contextlib.closing(self.kind(self.queue)) as loop:
            while not self.ended:
                if dice.random() < 0.05:
                    dice.choice((self.queue.stop, self.queue.unbind))()
                try:
                    loop.start()
                    self.ran += 1
                except RuntimeError as error:
                    if "call bind()" not in str(error):
                        raise
                    time.sleep(0)
                self.returned += 1

    def disturb(self, seed: int, steps: int, flow: UdpFlow) -> None:
        dice = random.Random(seed)
        for _ in range(steps):
            step = dice.choice(("bind", "bind", "stop", "unbind", "send"))
            before = self.returned
            if step == "bind":
                bind(self.queue, self.queue_num, self.kind, dice.choice((1, 2, 32)))
            elif step == "send":
                send(flow)
            else:
                getattr(self.queue, step)()
                # Often, but not always: more may come while the loop is on its way out.
                if dice.random() < 0.6:
                    wait_until(lambda: self.returned > before, what=f"{step} heard")  # noqa: B023
            if dice.random() < 0.1:
                time.sleep(dice.random() * 0.0005)
        self.ended = True
        self.queue.unbind()


class Player:
    """One of two threads that both do everything."""

    def __init__(self, kind: type[Run], queue: NetfilterQueue, queue_num: int) -> None:
        self.kind = kind
        self.queue = queue
        self.queue_num = queue_num
        self.taken = 0  # steps
        self.waits = False  # runs the loop, or has ended: nothing comes from it by itself
        self.ended = False

    def play(self, seed: int, steps: int, flow: UdpFlow) -> None:
        dice = random.Random(seed)
        try:
            with contextlib.closing(self.kind(self.queue)) as loop:
                for _ in range(steps):
                    self.step(dice, loop, flow)
                    self.taken += 1
        finally:
            self.waits = self.ended = True

    def step(self, dice: random.Random, loop: Run, flow: UdpFlow) -> None:
        step = dice.choice(("start", "start", "bind", "bind", "stop", "unbind", "send"))
        if step == "start":
            self.waits = True
            try:
                loop.start()
            except RuntimeError as error:
                if "call bind()" not in str(error):
                    raise
            self.waits = False
        elif step == "bind":
            bind(self.queue, self.queue_num, self.kind, dice.choice((1, 2, 32)))
        elif step == "send":
            send(flow)
        else:
            getattr(self.queue, step)()


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", KINDS)
def test_each_end_is_heard_and_nothing_hangs(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    kind: type[Run],
    seed: int,
) -> None:
    flow = queued()
    interleaving = Interleaving(kind, queue, queue_num)
    steps = STEPS // (SEEDS * len(KINDS))
    running = in_thread(interleaving.run_again_and_again, seed)
    in_thread(interleaving.disturb, seed, steps, flow).result(WATCHDOG)
    running.result(TIMEOUT)
    assert interleaving.ran > steps // 20, "not all of the time without a queue"
    assert_as_good_as_new(queue, queue_num, flow)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_that_both_do_everything_never_hang(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    kind: type[Run],
    seed: int,
) -> None:
    flow = queued()
    players = [Player(kind, queue, queue_num) for _ in range(2)]
    steps = STEPS // (SEEDS * len(KINDS) * len(players))
    running = [
        in_thread(player.play, len(players) * seed + place, steps, flow)
        for place, player in enumerate(players)
    ]
    deadline = time.monotonic() + WATCHDOG
    stopped: list[int] = []
    while not all(player.ended for player in players):
        taken = [player.taken for player in players]
        if taken != stopped and all(player.waits for player in players):
            # Nobody else would end this; and one stop must do.
            queue.stop()
            stopped = taken
        assert time.monotonic() < deadline, "the watchdog"
        time.sleep(0)
    for future in running:
        future.result(TIMEOUT)
    queue.unbind()
    assert_as_good_as_new(queue, queue_num, flow)


def assert_as_good_as_new(queue: NetfilterQueue, queue_num: int, flow: UdpFlow) -> None:
    flow.arrived()
    with contextlib.suppress(OSError):  # of the last rejected datagram
        flow.send(b"lost")
    queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
    flow.send(b"hello")
    (packet,) = queue.read()
    assert udp_data(packet) == b"hello"
    packet.accept()
    assert flow.receive() == b"hello"
    assert queue.read(timeout=0) == []

"""Packets for coroutines, on asyncio and on trio.

All that differs between the two is how to wait until a descriptor is readable. No packet is read
before that, so none is lost when the waiting is cancelled.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import ModuleType

    from typing_extensions import Self

    from netfilterqueue import Packet


class Pulling(Protocol):
    """What the queue offers to both loops: packets of one binding, without waiting."""

    @property
    def ended(self) -> bool: ...
    def begin_waiting(self) -> int: ...
    def end_waiting(self, descriptor: int, /) -> None: ...
    def take(self) -> Packet | None: ...
    def read(self) -> Packet | None: ...
    def close(self, packets: list[Packet] | None = None, /) -> None: ...


def running_trio() -> ModuleType | None:
    """trio, if the caller is one of its tasks; it cannot be without having imported it."""
    trio = sys.modules.get("trio")
    if trio is not None:
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            return None
    return trio


async def checkpoint() -> None:
    """Let other tasks run, and be cancelled here."""
    trio = running_trio()
    if trio is None:
        await asyncio.sleep(0)
    else:
        await trio.lowlevel.checkpoint()


async def wait_readable(descriptor: int, seconds: float) -> None:
    """Wait until the descriptor is readable, or for so many seconds."""
    trio = running_trio()
    if trio is not None:
        try:
            with trio.move_on_after(seconds):
                await trio.lowlevel.wait_readable(descriptor)
        finally:
            # To close it would not be enough, as it has duplicates.
            trio.lowlevel.notify_closing(descriptor)
        return
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def wake() -> None:
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(descriptor, wake)
    timer = loop.call_later(seconds, wake) if seconds < math.inf else None
    try:
        await readable
    finally:
        loop.remove_reader(descriptor)
        if timer is not None:
            timer.cancel()


async def wait_for_one(pulling: Pulling, timeout: float) -> Packet | None:
    """The next packet; None at the end, or after so many seconds."""
    deadline = time.monotonic() + timeout
    while not pulling.ended:
        packet = pulling.read()
        if packet is not None:
            return packet
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return None
        descriptor = pulling.begin_waiting()
        if descriptor >= 0:
            try:
                await wait_readable(descriptor, remaining)
            finally:
                pulling.end_waiting(descriptor)
    return None


class Packets:
    """``async for`` over a queue."""

    def __init__(self, pulling: Pulling) -> None:
        self._pulling = pulling

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Packet:
        packet = self._pulling.take()
        if packet is None:
            # Between two reads, so that a flood of packets does not shut other tasks out.
            await checkpoint()
            packet = await wait_for_one(self._pulling, math.inf)
        if packet is None:
            self._pulling.close()
            raise StopAsyncIteration
        return packet


async def read(pulling: Pulling, count: int | None, timeout: float | None) -> list[Packet]:
    """Wait for packets; what one read brings, ``count`` at the most."""
    packets: list[Packet] = []
    try:
        await checkpoint()
        packet = await wait_for_one(pulling, math.inf if timeout is None else timeout)
        while packet is not None:
            packets.append(packet)
            packet = pulling.take() if len(packets) != count else None
    finally:
        pulling.close(packets)
    return packets

"""What tests need of an event loop, on asyncio and on trio."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

# trio registers with hypothesis, which looks for its caller by the collector: not after conftest.py
# has frozen what there is.
import hypothesis  # noqa: F401
import trio

from support import TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Main = Callable[[], Awaitable[Any]]


class Loop(Protocol):
    """An event loop."""

    def run(self, main: Main) -> Any: ...

    async def sleep(self, seconds: float) -> None: ...

    async def until(self, predicate: Callable[[], object]) -> None:
        """Return as soon as the predicate is true. run() has a time limit."""

    async def together(self, *tasks: Main) -> None:
        """Wait for tasks that run at the same time."""

    async def cancelled(self, task: Main, steps: int) -> Any:
        """Cancel a task after so many turns of the loop. What it returned in spite of that."""

    async def limited(self, task: Main, seconds: float) -> Any:
        """What a task returns in that time, else None."""


class OnAsyncio:
    def run(self, main: Main) -> Any:
        async def limited() -> Any:
            return await asyncio.wait_for(main(), TIMEOUT)

        return asyncio.run(limited())

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def until(self, predicate: Callable[[], object]) -> None:
        while not predicate():
            await asyncio.sleep(0.001)

    async def together(self, *tasks: Main) -> None:
        await asyncio.gather(*(task() for task in tasks))

    async def cancelled(self, task: Main, steps: int) -> Any:
        running = asyncio.ensure_future(task())
        for _ in range(steps):
            await asyncio.sleep(0)
        running.cancel()
        try:
            return await running
        except asyncio.CancelledError:
            return None

    async def limited(self, task: Main, seconds: float) -> Any:
        try:
            return await asyncio.wait_for(task(), seconds)
        except asyncio.TimeoutError:
            return None


class OnTrio:
    def run(self, main: Main) -> Any:
        async def limited() -> Any:
            with trio.fail_after(TIMEOUT):
                return await main()

        return trio.run(limited)

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def until(self, predicate: Callable[[], object]) -> None:
        while not predicate():
            await trio.sleep(0.001)

    async def together(self, *tasks: Main) -> None:
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(task)

    async def cancelled(self, task: Main, steps: int) -> Any:
        returned = None

        async def call() -> None:
            nonlocal returned
            returned = await task()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        return returned

    async def limited(self, task: Main, seconds: float) -> Any:
        with trio.move_on_after(seconds):
            return await task()

"""Nothing of log groups leaks; each public name has a test here, or fails."""

from __future__ import annotations

import asyncio
import itertools
from operator import attrgetter
from typing import TYPE_CHECKING

import pytest

from memory import assert_no_growth, public_names, suppressing
from netfilterqueue import nflog
from netfilterqueue.nflog import Nflog, NflogData

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support import UdpFlow

FLAGS = nflog.FLAG_SEQ | nflog.FLAG_SEQ_GLOBAL


def refuse(message: NflogData) -> None:
    raise LookupError


async def wait_for_one(log: Nflog) -> None:
    async for _ in log:
        break


def use_context(log: Nflog) -> None:
    with log:
        log.next()


def use_close(log: Nflog) -> None:
    log.queue()
    log.close()
    log.next()


def use_drops(log: Nflog) -> None:
    assert log.drops == 0
    log.drops = 0


def use_rcvbuf(log: Nflog) -> None:
    assert log.rcvbuf is not None
    log.rcvbuf = log.rcvbuf


def use_stop(log: Nflog) -> None:
    log.stop()
    assert log.next() is None


# What is done with a group to which three messages have come.
LOG_USES: dict[str, Callable[[Nflog, asyncio.AbstractEventLoop], object]] = {
    "__aiter__": lambda log, loop: loop.run_until_complete(wait_for_one(log)),
    "__del__": lambda log, loop: None,
    "__enter__": lambda log, loop: use_context(log),
    "__exit__": lambda log, loop: use_context(log),
    "__init__": lambda log, loop: suppressing(TypeError, Nflog),
    "__iter__": lambda log, loop: list(itertools.islice(log, 3)),
    "close": lambda log, loop: use_close(log),
    "drops": lambda log, loop: use_drops(log),
    "fileno": lambda log, loop: log.fileno(),
    "getfd": lambda log, loop: log.getfd(),
    "getgroup": lambda log, loop: log.getgroup(),
    "loop": lambda log, loop: suppressing(LookupError, log.loop, refuse),
    "lost": lambda log, loop: log.lost,
    "next": lambda log, loop: (log.next(), log.next(wait=False)),
    "queue": lambda log, loop: (log.queue(), log.queue(wait=False)),
    "queued": lambda log, loop: (log.queue(), log.queued),
    "rcvbuf": lambda log, loop: use_rcvbuf(log),
    "stop": lambda log, loop: use_stop(log),
}


# What is done with each message.
MESSAGE_USES: dict[str, Callable[[NflogData], object]] = {
    **{name: attrgetter(name) for name in dir(NflogData) if not name.startswith("_")},
    "__init__": lambda data: suppressing(TypeError, NflogData),
    "__iter__": dict,
    "__repr__": repr,
}


@pytest.fixture
def event_loop_used() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_every_public_name_has_a_leak_test() -> None:
    assert public_names(Nflog) == set(LOG_USES)
    assert public_names(NflogData) == set(MESSAGE_USES)


@pytest.mark.parametrize("name", LOG_USES)
def test_group(
    name: str,
    group: int,
    logged: Callable[..., UdpFlow],
    event_loop_used: asyncio.AbstractEventLoop,
) -> None:
    flow = logged()

    def once() -> None:
        log = nflog.open(group, qthresh=3, timeout=1, flags=FLAGS)
        flow.send(b"1", b"2", b"3")
        LOG_USES[name](log, event_loop_used)
        flow.arrived()

    assert_no_growth(once)


@pytest.mark.parametrize("name", MESSAGE_USES)
def test_message(name: str, group: int, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()

    def once() -> None:
        flow.send(b"1", b"2", b"3")
        for data in itertools.islice(log, 3):
            MESSAGE_USES[name](data)
        flow.arrived()

    with nflog.open(group, qthresh=3, timeout=1, flags=FLAGS) as log:
        assert_no_growth(once)


def test_messages_that_are_kept_for_a_while(group: int, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    kept: list[NflogData] = []

    def once() -> None:
        flow.send(b"1", b"2", b"3", b"4", b"5", b"6")
        kept.extend(itertools.islice(log, 6))
        del kept[:-9]
        flow.arrived()

    with nflog.open(group, qthresh=3, timeout=1) as log:
        assert_no_growth(once)

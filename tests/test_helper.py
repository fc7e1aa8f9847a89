"""The thread that sends verdicts in time, seen from signals."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import Packet
from support import wait_until, wait_until_queued

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import QueuedUdp

HELPER = "nfqueue-verdict"


def helper_task() -> Path | None:
    """The directory in /proc of this process's helper thread."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            if (task / "comm").read_text(encoding="ascii").strip() == HELPER:
                return task
    return None


class TestHelper:
    """The thread that sends verdicts in time is none of Python's: no signal is its own."""

    @pytest.fixture
    def helped(self, queued_udp: Callable[..., QueuedUdp], queue_num: int) -> QueuedUdp:
        """A queue whose helper runs, as a read has brought several packets; the first waits."""
        udp = queued_udp(verdict_delay=0.001)
        udp.flow.send(b"1", b"2")
        wait_until_queued(queue_num, 2)
        udp.queue.run(block=False)
        assert helper_task()
        return udp

    def test_every_signal_is_blocked_in_it(self, helped: QueuedUdp) -> None:
        task = helper_task()
        assert task is not None
        status = dict(
            line.split(":", 1) for line in (task / "status").read_text("ascii").splitlines()
        )
        blocked = int(status["SigBlk"], 16)
        assert blocked & 1 << (signal.SIGUSR1 - 1)
        # Nobody can block these two, and 32 and 33 are the C library's own.
        others = {signal.SIGKILL, signal.SIGSTOP, 32, 33}
        unblocked = {number for number in range(1, 65) if not blocked & 1 << (number - 1)}
        assert unblocked <= others

    def test_signal_that_python_blocks_stays_pending(self, helped: QueuedUdp) -> None:
        handled: list[int] = []
        before = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            os.kill(os.getpid(), signal.SIGUSR1)
            # The helper works, and has not been given what Python's threads refuse.
            helped.packets[0].accept()
            assert helped.flow.receive() == b"1"
            assert signal.SIGUSR1 in signal.sigpending()
            assert handled == []
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
            wait_until(lambda: handled == [signal.SIGUSR1])
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
            signal.signal(signal.SIGUSR1, before)

    def test_mask_of_the_calling_thread_is_as_before(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        udp = queued_udp(callback=Packet.accept)
        udp.deliver(b"1", b"2", b"3")
        udp.queue.unbind()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before

"""A worker for each queue of a rule that spreads its packets over several queues.

``-j NFQUEUE --queue-balance 0:3`` gives every connection to one of four queues, and with
``--queue-cpu-fanout`` every CPU's packets to that CPU's queue. ``serve(handler, range(4))`` runs a
process for each of them, on a CPU of its own::

    from netfilterqueue.workers import serve

    print(serve(handler, range(4)))

The process that calls serve() binds the queues and keeps them bound; workers are forks of it that
inherit the sockets. So a crash leaves the queue as it is: packets wait in the kernel until the
worker's successor reads them, instead of meeting a rule without a listener. What the crashed worker
had read cannot be read again, and its successor drops that.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Optional

from netfilterqueue import NetfilterQueue, Packet, Verdict
from netfilterqueue._arguments import integer, require_function
from netfilterqueue._impl import drop_older
from netfilterqueue._namespaces import system_call
from netfilterqueue.stats import kernel_queues

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkProcess
    from types import FrameType

    from typing_extensions import Self

    from netfilterqueue.stats import KernelQueue, QueueStats

__all__ = ["QueueStatistics", "Statistics", "WorkerCrashed", "serve"]

Handler = Callable[[Packet], Optional[Verdict]]

# A worker may be restarted so often within so many seconds. More is no accident but a program that
# does not work, and whoever started it should hear of it.
MAX_RESTARTS = 5
PERIOD = 60.0

GRACE = 5.0  # seconds; for the handler to come to the end of the packet at hand

ENDING = frozenset({signal.SIGINT, signal.SIGTERM})

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

logger = logging.getLogger("netfilterqueue.workers")


@dataclass(frozen=True)
class QueueStatistics:
    """What the kernel and serve() have counted for one queue, from bind to unbind.

    The kernel's numbers have 32 bits. They are all 0 where it does not show them.
    """

    queue_num: int
    packets: int  # that were decided, or dropped because the worker that had read them crashed
    dropped: int  # because the queue or the receive buffer was full
    undecided: int  # at the end: the kernel drops them
    restarts: int
    # As QueueStats has them; a process that was killed, or called os._exit(), has not told its own.
    verdicts: Counter[Verdict]
    verdict_errors: Counter[int]


@dataclass(frozen=True)
class Statistics:
    """What serve() returns: the sums, and the numbers of each queue."""

    queues: tuple[QueueStatistics, ...]

    @property
    def packets(self) -> int:
        return sum(queue.packets for queue in self.queues)

    @property
    def dropped(self) -> int:
        return sum(queue.dropped for queue in self.queues)

    @property
    def undecided(self) -> int:
        return sum(queue.undecided for queue in self.queues)

    @property
    def restarts(self) -> int:
        return sum(queue.restarts for queue in self.queues)

    @property
    def verdicts(self) -> Counter[Verdict]:
        return sum((queue.verdicts for queue in self.queues), Counter())

    @property
    def verdict_errors(self) -> Counter[int]:
        return sum((queue.verdict_errors for queue in self.queues), Counter())

    def __str__(self) -> str:
        verdicts = [f"{count} {verdict.name}" for verdict, count in sorted(self.verdicts.items())]
        return (
            f"{self.packets} packets in {len(self.queues)} queues, {self.dropped} dropped, "
            f"{self.undecided} undecided, {self.restarts} restarts; "
            f"verdicts: {', '.join(verdicts) or 'none'}"
        )


class WorkerCrashed(RuntimeError):
    """A worker crashed and was not restarted. ``statistics``: those of all queues."""

    statistics: Statistics


def serve(
    handler: Handler,
    queues: Iterable[int],
    *,
    processes: bool = True,
    restart: bool = True,
    **bind_options: Any,
) -> Statistics:
    """Serve several queues, each by a worker of its own, until SIGINT or SIGTERM.

    ``handler``
        is called with each packet, as the callback of ``NetfilterQueue.bind``.
    ``queues``
        The queue numbers, in the order of the CPUs that the workers are pinned to: the first one's
        worker runs on the first CPU that this process may use, and so on, in turns.
    ``processes``
        Workers are forks of this process; ``False``: they are threads of it.
    ``restart``
        Start a worker that has crashed again, up to 5 times within 60 seconds. ``False``: the first
        crash ends all of them.
    ``bind_options``
        go to ``NetfilterQueue.bind``.

    A signal ends the workers after the packet at hand; verdicts that are pending are sent, and the
    queues unbound. What happens is logged as ``netfilterqueue.workers``.

    To be called from the main thread, and before other threads are started, of which a
    RuntimeWarning reminds: a fork has only the thread that forked, but every lock that another one
    held. Raises what bind() raises, and then no worker was started; WorkerCrashed when a worker
    crashed that is not to be restarted, after the others have ended.
    """
    numbers = check_arguments(handler, queues)
    if processes and threading.active_count() > 1:
        text = (
            "serve() forks while other threads run, whose locks may stay locked in the workers: "
            "call it before they are started, or with processes=False"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    cpus = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals(ENDING | {signal.SIGCHLD} if processes else ENDING))
        workers: list[Worker] = []
        for place, number in enumerate(numbers):
            cpu = cpus[place % len(cpus)]
            kind: type[Worker] = ProcessWorker if processes else ThreadWorker
            worker = kind(number, cpu, handler, signals)
            stack.callback(worker.queue.close)
            worker.bind(bind_options)
            workers.append(worker)
        try:
            supervise(workers, signals, restart=restart)
        except WorkerCrashed as crash:
            crash.statistics = statistics_of(workers)
            raise
        logger.info("all workers have ended")
        return statistics_of(workers)


def check_arguments(handler: Any, queues: Iterable[int]) -> list[int]:
    require_function("the handler", handler, "the packet")
    numbers = [integer("queue number", number, 0, 0xFFFF) for number in queues]
    if not numbers:
        raise ValueError("no queue to serve: pass the numbers of the rule, such as range(4)")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"a queue has one worker, but a number is there twice: {numbers}")
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("call serve() from the main thread: it is ended by signals")
    return numbers


def supervise(workers: Sequence[Worker], signals: Signals, *, restart: bool) -> None:
    """Run the workers until a signal comes; whatever ends this ends all of them."""
    try:
        for worker in workers:
            worker.start()
        logger.info("%d workers serve queues %s", len(workers), [one.queue_num for one in workers])
        while not signals.ending:
            signals.wait(None)
            for worker in workers:
                # What ends on a signal that went to all processes has not crashed.
                if worker.has_ended() and not signals.ending:
                    worker.restart(MAX_RESTARTS if restart else 0)
    finally:
        end(workers, signals)


def end(workers: Sequence[Worker], signals: Signals) -> None:
    running = [worker for worker in workers if not worker.has_ended()]
    for worker in running:
        worker.stop()
    logger.info("%d workers were told to end", len(running))
    deadline = time.monotonic() + GRACE
    while running and (remaining := deadline - time.monotonic()) > 0:
        signals.wait(remaining)
        running = [worker for worker in running if not worker.has_ended()]
    for worker in running:
        worker.abandon()


def statistics_of(workers: Sequence[Worker]) -> Statistics:
    try:
        rows = kernel_queues()
    except OSError as error:
        logger.warning("the statistics lack the kernel's numbers: %s", error)
        rows = {}
    return Statistics(tuple(worker.statistics(rows.get(worker.queue_num)) for worker in workers))


class Signals:
    """While entered, signals do no more than to end a wait of the main thread.

    They do so whichever thread the kernel picks for them, and whenever they come.
    """

    def __init__(self, numbers: frozenset[signal.Signals]) -> None:
        self.numbers = numbers
        self.ending = False

    def __enter__(self) -> Self:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        self.writer_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.before = {number: signal.signal(number, self.note) for number in self.numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self.writer_before)
        os.close(self.reader)
        os.close(self.writer)

    def note(self, number: int, _: FrameType | None) -> None:
        self.ending = self.ending or number in ENDING

    def wake(self) -> None:
        """End the main thread's wait from another thread."""
        # A full pipe ends it too.
        with contextlib.suppress(BlockingIOError):
            os.write(self.writer, b"\0")

    def wait(self, timeout: float | None) -> None:
        """Wait until something has happened since the last wait, or for so many seconds."""
        # Not select(), which takes no descriptor from 1024 on.
        poll = select.poll()
        poll.register(self.reader, select.POLLIN)
        poll.poll(None if timeout is None else timeout * 1000)
        with contextlib.suppress(BlockingIOError):
            os.read(self.reader, select.PIPE_BUF)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[set[int]]:
        """Block the signals, so that a fork decides what they do to it before they do."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)
        try:
            yield mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def leave(self, stop: Callable[[], object], mask: set[int]) -> None:
        """In a fork: let SIGTERM stop it, and SIGINT, which a terminal sends to all, do nothing."""
        signal.set_wakeup_fd(-1)
        for number in self.numbers - ENDING:
            signal.signal(number, self.before[number] or signal.SIG_DFL)
        # Not SIG_IGN, which programs that the handler starts would inherit.
        signal.signal(signal.SIGINT, lambda number, frame: None)
        signal.signal(signal.SIGTERM, lambda number, frame: stop())
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class Worker(abc.ABC):
    """One queue, and whatever runs it."""

    queue: NetfilterQueue
    error: BaseException | None = None  # what it raised, where that is known

    def __init__(self, queue_num: int, cpu: int, handler: Handler, signals: Signals) -> None:
        self.queue_num = queue_num
        self.cpu = cpu
        self.handler = handler
        self.signals = signals
        self.name = f"nfqueue-{queue_num}"
        self.restarts = 0
        self.crashes: list[float] = []  # when, on the clock of time.monotonic()
        self.verdicts: Counter[Verdict] = Counter()
        self.verdict_errors: Counter[int] = Counter()

    @abc.abstractmethod
    def bind(self, options: dict[str, Any]) -> None: ...

    @abc.abstractmethod
    def start(self) -> None: ...

    @abc.abstractmethod
    def has_ended(self) -> bool:
        """Whether nothing runs: not yet, or no more."""

    @abc.abstractmethod
    def how_it_ended(self) -> str: ...

    @abc.abstractmethod
    def stop(self) -> None:
        """Ask it to end after the packet at hand."""

    @abc.abstractmethod
    def abandon(self) -> None:
        """Go on without it: it has not ended in time."""

    @abc.abstractmethod
    def collect(self) -> None:
        """Take over what it has counted; it has ended, or was abandoned."""

    def add(self, counted: QueueStats) -> None:
        self.verdicts += Counter(counted.verdicts)
        self.verdict_errors += Counter(counted.verdict_errors)

    def pin(self) -> None:
        """Stay on this worker's CPU; called in the worker itself."""
        try:
            os.sched_setaffinity(0, {self.cpu})
        except OSError as error:
            logger.warning("%s cannot be pinned to CPU %d: %s", self.name, self.cpu, error)

    def restart(self, limit: int) -> None:
        """Start it once more, or raise WorkerCrashed if it has crashed too often for that."""
        now = time.monotonic()
        self.crashes = [*(then for then in self.crashes if now - then < PERIOD), now]
        what = f"the worker of queue {self.queue_num} {self.how_it_ended()}"
        count = len(self.crashes)
        if count > limit:
            often = f", crash number {count} within {PERIOD:g} seconds" if limit else ""
            raise WorkerCrashed(f"{what}{often}; the others were ended") from self.error
        text = "%s; it is restarted (%d of at most %d times within %g seconds)"
        logger.warning(text, what, count, limit, PERIOD)
        self.restarts += 1
        self.collect()
        self.start()

    def statistics(self, row: KernelQueue | None) -> QueueStatistics:
        self.collect()
        packets = dropped = undecided = 0
        if row:
            undecided = row.depth
            # Ids count from 1, and a packet that found no room in the buffer has got one too.
            packets = row.id_sequence - row.dropped_socket - undecided
            dropped = row.dropped_full + row.dropped_socket
        return QueueStatistics(
            self.queue_num,
            packets,
            dropped,
            undecided,
            self.restarts,
            self.verdicts,
            self.verdict_errors,
        )


class InheritedQueue(NetfilterQueue):
    """A queue that is run by one fork after the other of the process that has bound it."""

    def __init__(self, handler: Handler) -> None:
        super().__init__()
        self.handler = handler
        self.told_to_stop = False

    def run_in_fork(self) -> None:
        self.run(count=1)
        # The handler itself, so that the packets after the first one take no detour.
        self.handle = self.handler  # type: ignore[assignment, method-assign]
        # The stop() that ended one run() does not end the next.
        if not self.told_to_stop:
            self.run()

    def handle(self, packet: Packet) -> Verdict | None:
        """Called with the first packet."""
        # Messages come in the order of ids. So what is older was read by a process that is gone, or
        # while the queue was being bound. Nobody else can decide it, and it would fill the queue.
        drop_older(self, packet)
        return self.handler(packet)

    def stop_in_fork(self) -> None:
        self.told_to_stop = True
        self.stop()


class ProcessWorker(Worker):
    queue: InheritedQueue

    def __init__(self, queue_num: int, cpu: int, handler: Handler, signals: Signals) -> None:
        super().__init__(queue_num, cpu, handler, signals)
        self.queue = InheritedQueue(handler)
        self.process: ForkProcess | None = None
        self.report: Connection | None = None  # what it tells at its end comes from here

    def bind(self, options: dict[str, Any]) -> None:
        self.queue.bind(self.queue_num, user_callback=None, callback=None, **options)

    def start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.report, report = context.Pipe(duplex=False)
        with report, self.signals.held_back() as mask:
            arguments = (os.getpid(), mask, report)
            process = context.Process(target=self.main, name=self.name, args=arguments)
            process.start()
            # Not before: there may be no room for another process.
            self.process = process

    def main(self, parent: int, mask: set[int], report: Connection) -> None:
        """What the fork does."""
        # Without its parent nobody could end it, and the queue would stay bound.
        system_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
        self.signals.leave(self.queue.stop_in_fork, mask)
        self.pin()
        try:
            self.queue.run_in_fork()
        except BaseException:
            logger.exception("%s, process %d, crashed", self.name, os.getpid())
            sys.exit(1)
        finally:
            # Of the fork's copy: it sends what other threads have decided, and unbinds nothing.
            self.queue.close()
            # Shorter than PIPE_BUF, so that it is there as a whole or not at all.
            report.send(self.queue.stats())

    def has_ended(self) -> bool:
        return self.process is None or self.process.exitcode is not None

    def how_it_ended(self) -> str:
        assert self.process is not None
        status = self.process.exitcode
        assert status is not None
        if status < 0:
            return f"was killed by signal {-status} ({signal.strsignal(-status)})"
        return f"ended with exit status {status}"

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()

    def abandon(self) -> None:
        assert self.process is not None
        logger.error("%s has not ended within %g seconds and is killed", self.name, GRACE)
        self.process.kill()
        self.process.join()

    def collect(self) -> None:
        if self.report is None:
            return
        with self.report:
            # Other workers may hold its other end, and a fork that was killed has told nothing.
            with contextlib.suppress(EOFError):
                if self.report.poll():
                    self.add(self.report.recv())
        self.report = None


class ThreadWorker(Worker):
    def __init__(self, queue_num: int, cpu: int, handler: Handler, signals: Signals) -> None:
        super().__init__(queue_num, cpu, handler, signals)
        self.queue = NetfilterQueue()
        self.runs = False

    def bind(self, options: dict[str, Any]) -> None:
        self.queue.bind(self.queue_num, user_callback=self.call, callback=None, **options)

    def call(self, packet: Packet) -> Verdict | None:
        try:
            return self.handler(packet)
        except BaseException:
            # As after the crash of a process; here, what was read with it is not lost.
            if packet.verdict is None:
                packet.drop()
            raise

    def start(self) -> None:
        # A handler that does not return must not keep the program from ending.
        thread = threading.Thread(target=self.main, name=self.name, daemon=True)
        self.runs = True
        try:
            thread.start()
        except BaseException:
            self.runs = False
            raise

    def main(self) -> None:
        """What the thread does."""
        self.error = None
        self.pin()
        try:
            self.queue.run()
        except BaseException as error:
            self.error = error
            logger.exception("%s crashed", self.name)
        finally:
            self.runs = False
            self.signals.wake()

    def has_ended(self) -> bool:
        return not self.runs

    def how_it_ended(self) -> str:
        return f"raised {self.error!r}" if self.error else "ended by itself"

    def stop(self) -> None:
        self.queue.stop()

    def abandon(self) -> None:
        text = "%s has not ended within %g seconds; its queue is unbound all the same"
        logger.error(text, self.name, GRACE)

    def collect(self) -> None:
        # The queue counts over all threads that ran it.
        self.verdicts.clear()
        self.verdict_errors.clear()
        self.add(self.queue.stats())

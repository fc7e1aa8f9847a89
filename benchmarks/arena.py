"""Where contests take place: a contestant in a sandbox of its own, and the kernel's view of it."""

from __future__ import annotations

import select
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, TypeVar

from contest import Contestant
from netfilterqueue.testing import Sandbox

QUEUE = 1
PORT = 9  # discard
LOOPBACK = ("127.0.0.1", PORT)
PACKET_SIZE = 64  # bytes, the headers of IPv4 and UDP included
PAYLOAD = bytes(PACKET_SIZE - 28)
# What such a packet is charged for in a receive buffer: 832 bytes on Linux 6.18. A page's quarter
# leaves other kernels room.
CHARGE = 1024
LARGEST = 65535  # bytes of a UDP datagram, and more
DEADLINE = 60.0  # seconds, for whatever a contestant is told to do
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; not in the module socket

Self = TypeVar("Self", bound="Stage")


class ContestError(Exception):
    """A contestant did not do as it was told."""


class Counters(NamedTuple):
    """A queue's row of /proc/net/netfilter/nfnetlink_queue, as far as it matters here."""

    queued: int
    dropped: int  # because the queue was full
    dropped_by_socket: int  # because the receive buffer was full


def size_receive_buffer(sock: socket.socket, size: int) -> int:
    """Make a receive buffer this large, or as large as the user may; return its size in bytes."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def fitting(packets: int, charge: int = CHARGE) -> tuple[int, list[str]]:
    """As many of the packets as the receive buffer holds that the user may have for them; if those
    are not all, a note says so."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        room = size_receive_buffer(sock, packets * charge) // charge
    if room >= packets:
        return packets, []
    note = (
        f"net.core.rmem_max allows receive buffers for {room} packets, not for {packets}: root of "
        "the machine may have larger ones."
    )
    return room, [note]


def may_force_buffers() -> bool:
    """Whether the user is the machine's root, not just that of a user namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 65536)
        except PermissionError:
            return False
    return True


class Stage:
    """A contestant in a sandbox.

    For the machine's root the sandbox has no user namespace: inside one, nobody may exceed
    rmem_max.
    """

    def __init__(self, contestant: Contestant, *arguments: object) -> None:
        self.contestant = contestant
        self.command = [*contestant.command, *map(str, arguments)]

    def __enter__(self: Self) -> Self:
        with ExitStack() as stack:
            sandbox = Sandbox(user_namespace=not may_force_buffers())
            stack.enter_context(sandbox)
            self.router, self.hosts = sandbox.router, sandbox.hosts
            self.set_up(stack)
            self.process = self.router.popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(self.end)
            if self.hear() != "ready":
                raise ContestError(f"{self.contestant.label} did not start")
            self.closing = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.close()

    def set_up(self, stack: ExitStack) -> None:
        """What is to be there before the contestant starts."""

    def end(self) -> None:
        # Not killed: a profiler that it runs under writes its figures now.
        self.process.terminate()
        self.process.communicate(timeout=DEADLINE)

    def tell(self) -> None:
        """Let the contestant go on."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)

    def hear(self) -> str:
        """The contestant's next line."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], DEADLINE)[0]:
            raise ContestError(f"{self.contestant.label} said nothing for {DEADLINE} seconds")
        line = self.process.stdout.readline()
        if not line:
            raise ContestError(f"{self.contestant.label} ended, status {self.process.wait()}")
        return str(line.strip())

    def rows(self, table: str) -> list[list[int]]:
        """A table of numbers in /proc/net/netfilter."""
        text = self.router.run(["cat", f"/proc/net/netfilter/{table}"]).stdout
        return [list(map(int, line.split())) for line in text.splitlines()]


class QueueStage(Stage):
    """A contestant with its queue bound. No rule leads there yet."""

    def __init__(
        self,
        contestant: Contestant,
        job: str,
        verdict: str,
        *,
        max_len: int = 1024,
        receive_buffer: int = 1 << 21,
        flags: Sequence[str] = (),
    ) -> None:
        super().__init__(contestant, job, verdict, QUEUE, max_len, receive_buffer, *flags)
        self.receive_buffer = receive_buffer

    def counters(self) -> Counters:
        row = next(row for row in self.rows("nfnetlink_queue") if row[0] == QUEUE)
        return Counters(queued=row[2], dropped=row[5], dropped_by_socket=row[6])

    def expect(self, queued: int) -> None:
        """Have the kernel confirm how many packets wait, and that it dropped none."""
        found = self.counters()
        if found != Counters(queued, dropped=0, dropped_by_socket=0):
            raise ContestError(
                f"{self.contestant.label}: {queued} should wait, kernel says {found}"
            )


class Arena(QueueStage):
    """And two UDP sockets joined by loopback and the queue.

    What `sender` sends, and what `receiver` sends back, waits in the queue for a verdict.
    """

    def set_up(self, stack: ExitStack) -> None:
        self.router.rule("INPUT", "-i", "lo", "-p", "udp", queue=QUEUE)
        self.receiver = stack.enter_context(self.udp_socket())
        self.receiver.bind(LOOPBACK)
        self.sender = stack.enter_context(self.udp_socket())
        self.sender.connect(LOOPBACK)

    def udp_socket(self) -> socket.socket:
        sock = self.router.socket(socket.AF_INET, socket.SOCK_DGRAM)
        size_receive_buffer(sock, self.receive_buffer)
        sock.settimeout(DEADLINE)
        return sock

    def drain(self, payload: bytes, packets: int) -> float:
        """Fill the queue, have the contestant empty it, and return the seconds that this took."""
        for _ in range(packets):
            self.sender.send(payload)
        self.expect(queued=packets)
        self.tell()
        seconds = float(self.hear())
        self.expect(queued=0)
        return seconds

    def arrived(self) -> Iterator[bytes]:
        """The packets' data that the contestant has let pass."""
        self.receiver.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                yield self.receiver.recv(LARGEST)

    def receive(self, sock: socket.socket) -> None:
        """Wait for a packet that the contestant lets pass."""
        try:
            sock.recv(PACKET_SIZE)
        except socket.timeout:
            text = f"{self.contestant.label} let no packet pass for {DEADLINE} seconds"
            raise ContestError(text) from None

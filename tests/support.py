"""What tests are made of: traffic between nodes, programs, and waiting with a deadline."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from netfilterqueue._handmade import packets_from

import netfilterqueue
from messages import packet_message
from netfilterqueue.stats import kernel_queues

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from netfilterqueue import NetfilterQueue, Packet
    from netfilterqueue.stats import KernelQueue
    from netfilterqueue.testing import Node, Sandbox

# How many times longer than usual a test may take: more than 1 where a processor is emulated.
PATIENCE = float(os.environ.get("NETFILTERQUEUE_TEST_PATIENCE", "1"))

# Most tests are about something else than what becomes of their packets.
PACKETS_LET_GO = "ignore:a packet was let go of undecided:ResourceWarning"

TIMEOUT = 5.0 * PATIENCE  # seconds; generous, as only a failing test waits so long
START_TIMEOUT = 30.0  # seconds; scapy and gevent take long to import
SOON = 0.05  # seconds: long enough for a thread or a task to begin to wait

# Bytes; the kernel's default limit, so that every machine grants it and bind() does not warn.
RECEIVE_BUFFER = 212992

CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21
CAPABILITY_VERSION_3 = 0x20080522
# struct __user_cap_header_struct; two of struct __user_cap_data_struct, each effective, permitted,
# inheritable: see capset(2).
CAPABILITY_HEADER = struct.Struct("=Ii")
CAPABILITY_DATA = struct.Struct("=6I")

# What the rules of the fixture `logged` put before each message.
LOG_PREFIX = "logged: "

# The hosts' addresses on the bridge of `bridged_hosts`.
LEFT_MAC, RIGHT_MAC = b"\2\0\0\0\0\x11", b"\2\0\0\0\0\x12"

# The paths of a packet, as seen from the router, where the tests run; and a chain on each.
CHAINS = {"loopback": "INPUT", "input": "INPUT", "forward": "FORWARD", "output": "OUTPUT"}


# What `packets_from` counts.
NOTHING_SKIPPED = {"foreign": 0, "malformed": 0, "broken_attributes": 0, "unread_attributes": 0}


def skipping(**counts: int) -> dict[str, int]:
    return {**NOTHING_SKIPPED, **counts}


def decode_one(*attributes: bytes, **options: Any) -> Packet:
    """The packet in a message of these attributes, none of which may be skipped."""
    packets: list[Packet]
    packets, tally = packets_from([packet_message(*attributes, **options)])
    assert tally == NOTHING_SKIPPED
    assert len(packets) == 1
    return packets[0]


def wait_until(
    predicate: Callable[[], object], timeout: float = TIMEOUT, what: str | None = None
) -> None:
    """Return as soon as the predicate is true. Fail when it is not before the timeout (seconds)."""
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} seconds: {what or predicate}")
        time.sleep(0.001)


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Call a function in a thread of its own, which a test that fails need not wait for."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def system_calls(pid: int | str = "self") -> list[list[str]]:
    """Of each thread of a process that is in one: its number, and its arguments in hexadecimal."""
    found = []
    for path in Path("/proc", str(pid), "task").glob("*/syscall"):
        with contextlib.suppress(OSError):  # the thread has ended
            found.append(path.read_text(encoding="ascii").split())
    # Of one that waits elsewhere in the kernel there is no more than -1 and two pointers.
    return [call for call in found if len(call) > 3]


def is_blocked(fd: int, threads: int = 1, pid: int | str = "self") -> bool:
    """Whether so many threads of a process are in a system call on a descriptor."""
    return [call[1] for call in system_calls(pid)].count(hex(fd)) == threads


def wait_until_blocked(fd: int, threads: int = 1, pid: int | str = "self") -> None:
    wait_until(
        lambda: is_blocked(fd, threads, pid),
        what=f"{threads} thread(s) blocked on descriptor {fd}",
    )


def wait_until_polling() -> None:
    """Return when a thread of this process waits for one descriptor, for a limited time."""
    # poll(2): where the descriptors are, how many, and milliseconds, -1 for ever.
    wait_until(
        lambda: any(call[2] == "0x1" and 0 < int(call[3], 16) < 1 << 31 for call in system_calls()),
        what="a thread in poll()",
    )


def awaiting(queue: NetfilterQueue) -> int:
    """How many tasks of event loops wait for a queue: each has a descriptor of its socket."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found.append(os.readlink(path))
    return found.count(os.readlink(f"/proc/self/fd/{queue.fileno()}")) - 1


class Runner(Protocol):
    """A queue, or what runs one."""

    def fileno(self) -> int: ...

    def run(self, block: bool = True) -> None: ...


class SocketReader:
    """Runs a queue through a socket of its own, for `run_until`. `last`: the datagram at hand."""

    def __init__(self, queue: NetfilterQueue) -> None:
        self.queue = queue
        self.last = b""
        self.socket = socket.fromfd(queue.fileno(), socket.AF_NETLINK, socket.SOCK_RAW)

    def fileno(self) -> int:
        return self.socket.fileno()

    def recv(self, size: int) -> bytes:
        # No longer kept than by a usual socket.
        self.last = b""
        self.last = self.socket.recv(size)
        return self.last

    def run(self, block: bool = True) -> None:
        # The queue's own descriptor shares this.
        self.socket.setblocking(block)
        self.queue.run_socket(self)

    def close(self) -> None:
        self.socket.close()


def run_until(
    queue: Runner,
    predicate: Callable[[], object],
    timeout: float = TIMEOUT,
    what: str | None = None,
) -> None:
    """Run a queue until the predicate is true. Fail when it is not before the timeout (seconds)."""
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} seconds: {what or predicate}")
        # Not for longer: what the predicate waits for need not be a packet.
        if select.select([queue], [], [], 0.01)[0]:
            queue.run(block=False)


@contextlib.contextmanager
def alarm(after: float, handler: Callable[..., object], every: float = 0) -> Iterator[None]:
    """Call a signal handler after so many seconds: once, or again and again."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, after, every)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def alarm_when(begun: Callable[[], object], handler: Callable[..., object]) -> Iterator[None]:
    """Call a signal handler once, as soon as the predicate is true."""
    ended = threading.Event()

    def raise_signal() -> None:
        wait_until(lambda: ended.is_set() or begun())
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGALRM)

    with alarm(60, handler):
        raising = in_thread(raise_signal)
        try:
            yield
        finally:
            ended.set()
            raising.result(TIMEOUT)


@contextlib.contextmanager
def without_capability(capability: int) -> Iterator[None]:
    """Take it from the calling thread, whose capabilities are its own, for a while."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = CAPABILITY_HEADER.pack(CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(CAPABILITY_DATA.size)
    assert libc.capget(header, data) == 0
    effective, *others = CAPABILITY_DATA.unpack(data.raw)
    assert effective & 1 << capability
    lesser = CAPABILITY_DATA.pack(effective & ~(1 << capability), *others)
    assert libc.capset(header, lesser) == 0
    try:
        yield
    finally:
        assert libc.capset(header, data.raw) == 0


def without_net_admin() -> contextlib.AbstractContextManager[None]:
    return without_capability(CAP_NET_ADMIN)


def is_up(node: Node, interface: str) -> bool:
    """Whether it works: for a port of a bridge, also that the bridge uses it."""
    [found] = json.loads(node.run(["ip", "-details", "-json", "link", "show", interface]).stdout)
    port = found.get("linkinfo", {}).get("info_slave_data", {"state": "forwarding"})
    return bool(found["operstate"] == "UP" and port["state"] == "forwarding")


def readable(queue: netfilterqueue.NetfilterQueue) -> bool:
    return bool(select.select([queue], [], [], 0)[0])


def bound_queues(node: Node | None = None) -> dict[int, KernelQueue]:
    """The queues that somebody has bound in this process's network namespace, or in a node's."""
    return kernel_queues(node.pid if node else None)


def open_groups() -> dict[int, list[str]]:
    """The kernel's table of log groups in this process's network namespace: number to the rest."""
    path = Path("/proc/self/net/netfilter/nfnetlink_log")
    lines = path.read_text().splitlines() if path.exists() else []
    return {int(line.split()[0]): line.split()[1:] for line in lines}


def wait_until_queued(queue_num: int, count: int) -> None:
    """Return when so many packets of a queue wait for a verdict."""
    wait_until(
        lambda: bound_queues()[queue_num].depth == count,
        what=f"{count} packets in queue {queue_num}",
    )


def accepting(
    seen: list[bytes], then: Callable[[], object] = lambda: None
) -> Callable[[Packet], None]:
    """A callback that notes what a datagram carries, lets it pass, and then does something else."""

    def accept(packet: Packet) -> None:
        seen.append(udp_data(packet))
        packet.accept()
        then()

    return accept


class Route(NamedTuple):
    """Where traffic starts, where it ends, and under which address."""

    source: Node
    destination: Node
    address: str
    family: int

    @classmethod
    def of(cls, sandbox: Sandbox, path: str, *, ipv6: bool) -> Route:
        """The route for a path of `CHAINS`."""
        router, (left, right) = sandbox.router, sandbox.hosts
        source, destination = {
            "loopback": (router, router),
            "input": (left, router),
            "forward": (left, right),
            "output": (router, right),
        }[path]
        if path == "loopback":
            address = "::1" if ipv6 else "127.0.0.1"
        else:
            address = destination.ipv6 if ipv6 else destination.ipv4
        return cls(source, destination, address, socket.AF_INET6 if ipv6 else socket.AF_INET)


class UdpFlow:
    """Datagrams from a bound sender to a receiver. `port` is the receiver's."""

    def __init__(self, route: Route) -> None:
        self.receiver = route.destination.socket(route.family, socket.SOCK_DGRAM)
        self.receiver.bind((route.address, 0))
        self.receiver.settimeout(TIMEOUT)
        self.port: int = self.receiver.getsockname()[1]
        self.sender = route.source.socket(route.family, socket.SOCK_DGRAM)
        self.sender.connect((route.address, self.port))

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.sender.send(payload)

    def receive(self, timeout: float = TIMEOUT) -> bytes:
        """The next datagram. `socket.timeout` when there is none in time."""
        self.receiver.settimeout(timeout)
        return self.receiver.recv(65536)

    def receive_all(self, count: int, timeout: float = TIMEOUT) -> list[bytes]:
        return [self.receive(timeout) for _ in range(count)]

    def arrived(self) -> list[bytes]:
        """The datagrams that are there already."""
        payloads = []
        with contextlib.suppress(BlockingIOError):
            while True:
                payloads.append(self.receive(timeout=0))
        return payloads

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def udp_data(packet: netfilterqueue.Packet) -> bytes:
    """What a datagram of a `UdpFlow` carries, seen by a queue: no options, no extension headers."""
    payload = packet.get_payload()
    return payload[28:] if payload[0] >> 4 == 4 else payload[48:]


def numbered(count: int) -> list[bytes]:
    """Payloads that can be told apart: b"0", b"1" and so on."""
    return [b"%d" % number for number in range(count)]


def internet_checksum(data: bytes) -> int:
    """RFC 1071, for an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while carry := total >> 16:
        total = (total & 0xFFFF) + carry
    return ~total & 0xFFFF


class Ping:
    """Echo requests to a node, and its replies (RFC 792, RFC 4443). Payloads are of even length."""

    def __init__(self, route: Route) -> None:
        self.ipv6 = route.family == socket.AF_INET6
        self.request_type, self.reply_type = (128, 129) if self.ipv6 else (8, 0)
        protocol = socket.IPPROTO_ICMPV6 if self.ipv6 else socket.IPPROTO_ICMP
        self.socket = route.source.socket(route.family, socket.SOCK_RAW, protocol)
        self.socket.connect((route.address, 0))
        self.identifier = self.socket.fileno()
        self.sequence = 0

    def send(self, *payloads: bytes) -> None:
        for payload in payloads:
            self.sequence += 1
            message = struct.pack("!HHH", 0, self.identifier, self.sequence) + payload
            start = struct.pack("!BB", self.request_type, 0)
            # For ICMPv6 the kernel does it.
            checksum = 0 if self.ipv6 else internet_checksum(start + message)
            self.socket.send(start + struct.pack("!H", checksum) + message[2:])

    def receive(self, timeout: float = TIMEOUT) -> bytes:
        """The payload of the next reply; raises as `UdpFlow.receive`."""
        deadline = time.monotonic() + timeout
        while True:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            message = self.socket.recv(65536)
            if not self.ipv6:
                message = message[(message[0] & 0xF) * 4 :]
            # A raw socket sees what other sockets asked too, and on loopback the requests.
            kind, _, _, identifier, _ = struct.unpack_from("!BBHHH", message)
            if (kind, identifier) == (self.reply_type, self.identifier):
                return message[8:]

    def close(self) -> None:
        self.socket.close()


class Transfer:
    """Data on its way from a node to another in two threads, while the test handles the packets:
    by TCP, or another protocol of connections."""

    def __init__(self, route: Route, data: bytes, protocol: int = socket.IPPROTO_TCP) -> None:
        kind = (route.family, socket.SOCK_STREAM, protocol)
        self.listener = route.destination.socket(*kind)
        self.listener.bind((route.address, 0))
        self.listener.listen()
        self.port: int = self.listener.getsockname()[1]
        self.sender = route.source.socket(*kind)
        for end in (self.listener, self.sender):
            end.settimeout(TIMEOUT)
        self.threads = ThreadPoolExecutor(2)
        self.sent = self.threads.submit(self._send, (route.address, self.port), data)
        self.received = self.threads.submit(self._receive)

    def _send(self, address: tuple[str, int], data: bytes) -> None:
        with self.sender:
            self.sender.connect(address)
            # Of SCTP a message must fit into the buffer of the socket.
            for start in range(0, len(data), 65536):
                self.sender.sendall(data[start : start + 65536])

    def _receive(self) -> bytes:
        connection, _ = self.listener.accept()
        parts = []
        with connection:
            connection.settimeout(TIMEOUT)
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)

    @property
    def done(self) -> bool:
        return self.received.done() and self.sent.done()

    def result(self) -> bytes:
        """What arrived. Raises what either end raised."""
        self.sent.result(TIMEOUT)
        return self.received.result(TIMEOUT)

    def close(self) -> None:
        self.threads.shutdown()
        self.sender.close()
        self.listener.close()


Flow = TypeVar("Flow", UdpFlow, Ping, Transfer)


class Traffic:
    """Makes traffic that is closed after the test. Paths are the keys of `CHAINS`."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._stack = contextlib.ExitStack()

    def udp(self, path: str = "loopback", *, ipv6: bool = False) -> UdpFlow:
        return self.udp_over(Route.of(self._sandbox, path, ipv6=ipv6))

    def udp_over(self, route: Route) -> UdpFlow:
        return self._keep(UdpFlow(route))

    def ping(self, path: str = "loopback", *, ipv6: bool = False) -> Ping:
        return self._keep(Ping(Route.of(self._sandbox, path, ipv6=ipv6)))

    def tcp(self, path: str, data: bytes, *, ipv6: bool = False) -> Transfer:
        return self._keep(Transfer(Route.of(self._sandbox, path, ipv6=ipv6), data))

    def sctp(self, path: str, data: bytes, *, ipv6: bool = False) -> Transfer:
        route = Route.of(self._sandbox, path, ipv6=ipv6)
        return self._keep(Transfer(route, data, socket.IPPROTO_SCTP))

    def _keep(self, flow: Flow) -> Flow:
        return self._stack.enter_context(contextlib.closing(flow))

    def close(self) -> None:
        self._stack.close()


class QueuedUdp:
    """Datagrams that pass a queue of this process. `packets`: those delivered so far."""

    def __init__(self, flow: UdpFlow, queue: NetfilterQueue, packets: list[Packet]) -> None:
        self.flow = flow
        self.queue = queue
        self.packets = packets

    def deliver(self, *payloads: bytes) -> list[Packet]:
        """Send datagrams, run the queue until all have been delivered, and return their packets."""
        before = len(self.packets)
        self.flow.send(*payloads)
        run_until(self.queue, lambda: len(self.packets) >= before + len(payloads))
        return self.packets[before:]

    def deliver_one(self, payload: bytes = b"hello") -> Packet:
        (packet,) = self.deliver(payload)
        return packet


class Program:
    """A running Python program, text given, that uses the same `netfilterqueue` as the tests.

    Standard error goes the way of standard output. Each wait has a deadline (seconds), after which
    the program is made to show its tracebacks and is killed, and the test fails with its output.
    """

    def __init__(
        self,
        node: Node,
        source: str,
        *arguments: str,
        python: Sequence[str] = ("-W", "error", "-W", PACKETS_LET_GO, "-X", "faulthandler", "-u"),
        env: dict[str, str] | None = None,
    ) -> None:
        package = str(Path(netfilterqueue.__file__).parents[1])
        search = filter(None, (package, os.environ.get("PYTHONPATH")))
        # gevent does not do without a GIL: where there is none by default, it has to be asked for.
        switches = {"PYTHON_GIL": "1"} if "import gevent" in source else {}
        self.process = node.popen(
            [sys.executable, *python, "-c", textwrap.dedent(source), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",  # else a `netfilterqueue` in the current directory would come first
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(search),
                **switches,
                **(env or {}),
            },
        )
        assert self.process.stdout is not None
        self._stdout = self.process.stdout
        self._output = b""

    @property
    def output(self) -> str:
        """What was read so far; all of it after `wait`."""
        return self._output.decode(errors="backslashreplace")

    def wait_for(self, text: str, timeout: float = TIMEOUT) -> None:
        """Return when the output contains the text."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            if not self._read(deadline):
                self._fail(f"ended without {text!r}")

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Return the exit status when the program has ended."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        return self.process.wait()

    def run(self, timeout: float = TIMEOUT) -> str:
        """Wait for the program's end, which must be a success, and return its output."""
        if (status := self.wait(timeout)) != 0:
            self._fail(f"exit status {status}")
        return self.output

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stdout.close()

    def _read(self, deadline: float) -> bool:
        """Read more output; false at its end."""
        remaining = deadline - time.monotonic()
        if remaining < 0 or not select.select([self._stdout], [], [], remaining)[0]:
            self.process.send_signal(signal.SIGABRT)  # faulthandler shows the tracebacks
            self._output += self._stdout.read()
            self._fail("too slow")
        data = os.read(self._stdout.fileno(), 65536)
        self._output += data
        return bool(data)

    def _fail(self, reason: str) -> None:
        self.close()
        raise AssertionError(f"{reason}; the output of the program:\n{self.output}")

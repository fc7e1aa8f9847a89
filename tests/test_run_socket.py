"""`run_socket()`: the same as `run()`, through any object with `recv(n)`."""

from __future__ import annotations

import errno
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict
from support import (
    CHAINS,
    TIMEOUT,
    in_thread,
    numbered,
    readable,
    udp_data,
    wait_until,
    wait_until_blocked,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support import UdpFlow

KINDS = {
    "unix stream": (socket.AF_UNIX, socket.SOCK_STREAM),
    "netlink raw": (socket.AF_NETLINK, socket.SOCK_RAW),
}


class NothingPending(OSError):
    """An error of EAGAIN that some other library made, which is no BlockingIOError."""


class Recv:
    """The least that run_socket() takes: answers and errors in turn, then EAGAIN."""

    def __init__(self, *turns: Callable[[int], Any]) -> None:
        self.turns = iter(turns)
        self.sizes: list[int] = []

    def recv(self, size: int) -> Any:
        self.sizes.append(size)
        turn = next(self.turns, None)
        if turn is None:
            raise BlockingIOError(errno.EAGAIN, "nothing is pending")
        return turn(size)


def raising(error: BaseException) -> Callable[[int], bytes]:
    def turn(_: int) -> bytes:
        raise error

    return turn


@pytest.fixture
def duplicate(queue: NetfilterQueue) -> Iterator[socket.socket]:
    """What programs pass to run_socket()."""
    with socket.fromfd(queue.get_fd(), socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        yield sock


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "non-blocking"])
@pytest.mark.parametrize(("path", "ipv6"), [("loopback", False), ("forward", True)])
def test_takes_a_duplicate_made_in_either_way_and_either_mode(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    kind: str,
    blocking: bool,
    path: str,
    ipv6: bool,
) -> None:
    def accept(packet: Packet) -> None:
        packet.accept()
        if udp_data(packet) == b"49" and blocking:
            queue.stop()

    flow = queued(path, ipv6=ipv6)
    queue.bind(queue_num, accept)
    flow.send(*numbered(50))
    wait_until_queued(queue_num, 50)
    with socket.fromfd(queue.get_fd(), *KINDS[kind]) as sock:
        sock.setblocking(blocking)
        result: Any = queue.run_socket(sock)  # type: ignore[func-returns-value]
    assert result is None
    assert flow.receive_all(50) == numbered(50)
    assert flow.arrived() == []


@pytest.mark.parametrize("path", CHAINS)
def test_waits_for_packets_on_a_blocking_socket_until_stopped(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
    path: str,
) -> None:
    flow = queued(path)
    queue.bind(queue_num, Packet.accept)
    running = in_thread(queue.run_socket, duplicate)
    for data in numbered(3):
        wait_until_blocked(duplicate.fileno())
        flow.send(data)
        assert flow.receive() == data
    wait_until_blocked(duplicate.fileno())
    queue.stop()
    assert running.result(TIMEOUT) is None


@pytest.mark.parametrize("end", [NetfilterQueue.unbind, NetfilterQueue.close])
def test_returns_when_another_thread_ends_the_binding(
    queue: NetfilterQueue,
    queue_num: int,
    duplicate: socket.socket,
    end: Callable[[NetfilterQueue], None],
) -> None:
    queue.bind(queue_num, Packet.accept)
    running = in_thread(queue.run_socket, duplicate)
    wait_until_blocked(duplicate.fileno())
    end(queue)
    assert running.result(TIMEOUT) is None


def test_socket_timeout_propagates_and_a_loop_around_it_can_look_at_its_stop_flag(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
) -> None:
    finish = threading.Event()
    timeouts: list[float] = []

    def loop() -> None:
        duplicate.settimeout(0.05)
        while not finish.is_set():
            try:
                queue.run_socket(duplicate)
            except socket.timeout:  # noqa: PERF203 - as programs write it
                timeouts.append(time.monotonic())

    flow = queued()
    queue.bind(queue_num, Packet.accept)
    looping = in_thread(loop)
    for _ in range(2):
        seen = len(timeouts)
        wait_until(lambda seen=seen: len(timeouts) > seen)  # type: ignore[misc]
        flow.send(b"payload")
        assert flow.receive() == b"payload"
    finish.set()
    looping.result(TIMEOUT)


def test_enobufs_of_recv_does_not_end_it(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
) -> None:
    flow = queued()
    queue.bind(queue_num, Packet.accept)
    flow.send(b"before", b"after")
    overrun = raising(OSError(errno.ENOBUFS, "no buffer space available"))
    sock = Recv(duplicate.recv, overrun, overrun, duplicate.recv)
    queue.run_socket(sock)
    assert flow.arrived() == [b"before", b"after"]
    assert len(sock.sizes) == 5


@pytest.mark.parametrize("kind", [BlockingIOError, NothingPending])
def test_eagain_of_recv_makes_it_return(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
    kind: type[OSError],
) -> None:
    flow = queued()
    queue.bind(queue_num, Packet.accept)
    flow.send(b"before", b"after")
    error = kind(errno.EAGAIN, "nothing is pending")
    queue.run_socket(Recv(duplicate.recv, raising(error), duplicate.recv))
    assert flow.arrived() == [b"before"]


@pytest.mark.parametrize("kind", [OSError, socket.timeout, ValueError, KeyboardInterrupt])
def test_other_errors_of_recv_propagate_after_what_is_pending_has_been_sent(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
    kind: type[BaseException],
) -> None:
    flow = queued()
    queue.bind(queue_num, Packet.accept)
    flow.send(b"payload")
    error = kind(errno.EBADF, "of recv")
    with pytest.raises(kind) as caught:
        queue.run_socket(Recv(duplicate.recv, raising(error)))
    assert caught.value is error
    assert flow.arrived() == [b"payload"]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS, errno.EBADF])
@pytest.mark.parametrize("kind", [OSError, socket.timeout, ValueError])
def test_callbacks_own_error_propagates_whatever_it_is(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
    kind: type[Exception],
    number: int,
) -> None:
    refused: list[Packet] = []
    error = kind(number, "of the callback")

    def accept(packet: Packet) -> None:
        if not refused:
            refused.append(packet)
            raise error
        packet.accept()

    flow = queued()
    queue.bind(queue_num, accept)
    flow.send(b"first", b"second")
    duplicate.setblocking(False)
    with pytest.raises(kind) as caught:
        queue.run_socket(duplicate)
    assert caught.value is error
    assert refused[0].verdict is None
    assert readable(queue)
    queue.run_socket(duplicate)
    refused[0].accept()
    assert flow.arrived() == [b"second", b"first"]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_recv_may_return_any_bytes_like_object(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
    kind: Callable[[bytes], Any],
) -> None:
    flow = queued()
    queue.bind(queue_num, Packet.accept)
    flow.send(b"payload")
    queue.run_socket(Recv(lambda size: kind(duplicate.recv(size))))
    assert flow.arrived() == [b"payload"]


def test_recv_must_return_bytes(queue: NetfilterQueue, queue_num: int) -> None:
    queue.bind(queue_num, Packet.accept)
    with pytest.raises(TypeError, match="bytes-like"):
        queue.run_socket(Recv(lambda _: "text"))


@pytest.mark.parametrize("sock", [None, 3])
def test_there_must_be_a_recv(queue: NetfilterQueue, queue_num: int, sock: Any) -> None:
    queue.bind(queue_num, Packet.accept)
    with pytest.raises(TypeError, match=rf"another object with recv\(n\); got {sock}"):
        queue.run_socket(sock)


def test_recv_is_asked_for_enough_for_the_largest_packet(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
) -> None:
    lengths = []

    def accept(packet: Packet) -> None:
        lengths.append(packet.get_payload_len())
        packet.accept()

    flow = queued()
    queue.bind(queue_num, accept)
    data = bytes(65531 - 28)
    flow.send(data)
    sock = Recv(duplicate.recv)
    queue.run_socket(sock)
    assert lengths == [65531]
    assert flow.arrived() == [data]
    assert min(sock.sizes) > 65531


def test_packet_and_its_views_stay_usable_after_the_callback(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
) -> None:
    kept: list[tuple[Packet, memoryview]] = []

    def keep(packet: Packet) -> None:
        kept.append((packet, memoryview(packet)))
        packet.retain()

    def recv(size: int) -> bytes:
        # An object as small as the datagram: its memory, once freed, is soon used again.
        return bytes(bytearray(duplicate.recv(size)))

    flow = queued()
    queue.bind(queue_num, keep)
    flow.send(*numbered(20))
    queue.run_socket(Recv(*20 * [recv]))
    assert [udp_data(packet) for packet, _ in kept] == numbered(20)
    assert [bytes(view[28:]) for _, view in kept] == numbered(20)
    for packet, _ in reversed(kept):
        packet.accept()
    assert flow.arrived() == numbered(20)[::-1]


def test_callback_may_return_the_verdict(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
) -> None:
    flow = queued()
    queue.bind(queue_num, lambda _: Verdict.ACCEPT)
    flow.send(b"payload")
    duplicate.setblocking(False)
    queue.run_socket(duplicate)
    assert flow.arrived() == [b"payload"]


def test_overridden_handle_gets_its_packets(queue_num: int, queued: Callable[..., UdpFlow]) -> None:
    class Accepting(NetfilterQueue):
        def handle(self, packet: Packet) -> None:
            packet.accept()

    flow = queued()
    with Accepting() as queue:
        queue.bind(queue_num)
        flow.send(b"payload")
        with socket.fromfd(queue.get_fd(), socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            queue.run_socket(sock)
    assert flow.arrived() == [b"payload"]


def test_delivers_first_what_run_had_read_and_left(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
) -> None:
    def accept(packet: Packet) -> None:
        packet.accept()
        if udp_data(packet) == b"1":
            queue.stop()

    flow = queued()
    queue.bind(queue_num, accept)
    flow.send(*numbered(5))
    queue.run()
    assert flow.arrived() == numbered(2)
    flow.send(b"new")
    duplicate.setblocking(False)
    queue.run_socket(duplicate)
    assert flow.arrived() == [*numbered(5)[2:], b"new"]
    assert not readable(queue)


def test_stop_before_it_makes_the_next_one_return_at_once(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
) -> None:
    flow = queued()
    queue.bind(queue_num, Packet.accept)
    flow.send(b"payload")
    queue.stop()
    queue.run_socket(duplicate)
    assert flow.arrived() == []
    duplicate.setblocking(False)
    queue.run_socket(duplicate)
    assert flow.arrived() == [b"payload"]


def test_packet_that_waits_does_not_wait_for_those_of_other_reads(
    queue: NetfilterQueue,
    queue_num: int,
    queued: Callable[..., UdpFlow],
    duplicate: socket.socket,
) -> None:
    """Each `recv` brings one packet, so that each verdict is sent at once, as in the classic."""
    arrived: list[list[bytes]] = []

    def accept(packet: Packet) -> None:
        packet.accept()
        arrived.append(flow.arrived())

    flow = queued()
    queue.bind(queue_num, accept, verdict_delay=60)
    flow.send(*numbered(3))
    duplicate.setblocking(False)
    queue.run_socket(duplicate)
    assert arrived == [[data] for data in numbered(3)]

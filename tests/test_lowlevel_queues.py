"""Queues of the real kernel by `netfilterqueue.lowlevel`: configured, shared, ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, lowlevel
from netfilterqueue.lowlevel import (
    NF_ACCEPT,
    NF_DROP,
    NF_QUEUE,
    NFQA_CFG_F_UID_GID,
    NFQNL_COPY_META,
    NFQNL_COPY_PACKET,
    NetfilterQueueData,
    NetfilterQueueHandle,
    NetfilterQueueQueueHandle,
)
from support import TIMEOUT, bound_queues, in_thread, wait_until_queued, without_net_admin
from test_fork import Child
from test_lowlevel import USES_OF_HANDLE, USES_OF_QUEUE, accept, fail, ignore, is_readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support import UdpFlow

TOO_LATE = "Parent queue has already been unbound"
CLOSED = "this handle is closed: open\\(\\) makes another"
UNKNOWN_FLAG = 1 << 30


@pytest.fixture
def handle(queue_num: int) -> Iterator[NetfilterQueueHandle]:
    """A handle whose queues are the kernel's."""
    with contextlib.closing(lowlevel.open()) as opened:
        yield opened


@contextlib.contextmanager
def socket_of(handle: NetfilterQueueHandle) -> Iterator[socket.socket]:
    with socket.fromfd(handle.fd(), socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        sock.settimeout(TIMEOUT)
        yield sock


def loop_until(handle: NetfilterQueueHandle, predicate: Callable[[], object]) -> None:
    """The loop of a program, until the predicate is true. Fails when it is not in time."""
    deadline = time.monotonic() + TIMEOUT
    with socket_of(handle) as sock:
        while not predicate():
            assert time.monotonic() < deadline, "not in time"
            if select.select([sock], [], [], 0.01)[0]:
                handle.handle_packet(sock.recv(65536))


class TestClosing:
    @pytest.mark.parametrize("use", USES_OF_HANDLE.values(), ids=USES_OF_HANDLE)
    def test_closed_handle_raises(self, use: Callable[[NetfilterQueueHandle], Any]) -> None:
        handle = lowlevel.open()
        handle.close()
        handle.close()
        with pytest.raises(ValueError, match=CLOSED):
            use(handle)

    def test_socket_is_closed(self) -> None:
        handle = lowlevel.open()
        fd = handle.fd()
        handle.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    @pytest.mark.parametrize("end", ["destroy", "close"])
    @pytest.mark.parametrize("use", USES_OF_QUEUE.values(), ids=USES_OF_QUEUE)
    def test_queue_that_has_ended_raises(
        self,
        handle: NetfilterQueueHandle,
        queue_num: int,
        use: Callable[[NetfilterQueueQueueHandle], Any],
        end: str,
    ) -> None:
        queue = handle.create_queue(queue_num, ignore)
        (queue.destroy if end == "destroy" else handle.close)()
        queue.destroy()
        assert queue_num not in bound_queues()
        with pytest.raises(ValueError, match=CLOSED if end == "close" else "is destroyed"):
            use(queue)

    @pytest.mark.parametrize("end", ["close", "collect"])
    def test_queues_end_with_the_handle_although_its_socket_lives_on(
        self, queue_num: int, end: str
    ) -> None:
        handle = lowlevel.open()
        with socket.fromfd(handle.fd(), socket.AF_NETLINK, socket.SOCK_RAW):
            handle.create_queue(queue_num, ignore)
            assert queue_num in bound_queues()
            if end == "close":
                handle.close()
            else:
                del handle
            assert queue_num not in bound_queues()

    def test_queue_keeps_its_handle(self, queue_num: int) -> None:
        queue = lowlevel.open().create_queue(queue_num, ignore)
        gc.collect()
        queue.set_maxlen(10)
        assert queue_num in bound_queues()
        del queue
        assert queue_num not in bound_queues()

    def test_child_leaves_its_parents_queue(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        handle.create_queue(queue_num, accept)
        Child(handle.close).wait()
        flow = queued()
        flow.send(b"hello")
        loop_until(handle, flow.arrived)


class TestQueues:
    def test_packets_come_whole_from_the_start(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        payloads = []

        def look(data: NetfilterQueueData) -> None:
            payloads.append(data.get_payload())
            data.set_verdict(NF_ACCEPT)

        handle.create_queue(queue_num, look)
        flow = queued()
        flow.send(bytes(9000))
        loop_until(handle, lambda: payloads)
        assert payloads[0][28:] == bytes(9000) == flow.receive()

    @pytest.mark.parametrize(
        ("mode", "copy_range", "row"),
        [
            (NFQNL_COPY_META, 0, (NFQNL_COPY_META, 0)),
            (NFQNL_COPY_PACKET, 20, (NFQNL_COPY_PACKET, 20)),
            (NFQNL_COPY_PACKET, 0xFFFF, (NFQNL_COPY_PACKET, 65531)),
            (NFQNL_COPY_PACKET, 0, (NFQNL_COPY_PACKET, 65531)),
        ],
    )
    def test_set_mode(
        self,
        handle: NetfilterQueueHandle,
        queue_num: int,
        mode: int,
        copy_range: int,
        row: tuple[int, int],
    ) -> None:
        queue = handle.create_queue(queue_num, ignore)
        queue.set_mode(mode, copy_range)
        found = bound_queues()[queue_num]
        assert found.copy_mode == row[0]
        if mode == NFQNL_COPY_PACKET:
            assert found.copy_range == row[1]

    def test_set_maxlen(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        handle.create_queue(queue_num, ignore).set_maxlen(2)
        with contextlib.suppress(PermissionError):  # what the sender of a dropped packet may get
            queued().send(b"1", b"2", b"3")
        row = bound_queues()[queue_num]
        assert (row.depth, row.dropped_full) == (2, 1)

    def test_flag_is_set_and_cleared(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        owners = []

        def look(data: NetfilterQueueData) -> None:
            owners.append((data.get_uid(), data.get_gid()))
            data.set_verdict(NF_ACCEPT)

        queue = handle.create_queue(queue_num, look)
        flow = queued(chain="OUTPUT")
        for flags in (0, NFQA_CFG_F_UID_GID, 0):
            queue.set_flags(NFQA_CFG_F_UID_GID, flags)
            flow.send(b"hello")
            loop_until(handle, flow.arrived)
        assert owners[0] == owners[2] == (None, None)
        # In a user namespace the kernel still tells the numbers of the outer one.
        assert None not in owners[1]

    def test_flag_that_the_kernel_lacks_is_named(
        self, handle: NetfilterQueueHandle, queue_num: int
    ) -> None:
        queue = handle.create_queue(queue_num, ignore)
        with pytest.raises(OSError, match=r"flags UID_GID and 0x40000000 of queue") as caught:
            queue.set_flags(UNKNOWN_FLAG | NFQA_CFG_F_UID_GID, UNKNOWN_FLAG)
        assert caught.value.errno == errno.EOPNOTSUPP

    @pytest.mark.parametrize(
        ("use", "error", "text"),
        [
            (lambda queue: queue.set_mode(3, 0), ValueError, "mode is 3"),
            (lambda queue: queue.set_mode(2, -1), ValueError, "range is -1"),
            (lambda queue: queue.set_flags(-1, 0), ValueError, "mask is -1"),
            (lambda queue: queue.set_flags(0, 2**32), ValueError, "flags is 4294967296"),
            (lambda queue: queue.set_maxlen(0), ValueError, "queuelen is 0"),
            (lambda queue: queue.set_maxlen("1"), TypeError, "queuelen must be an integer"),
        ],
    )
    def test_wrong_argument(
        self,
        handle: NetfilterQueueHandle,
        queue_num: int,
        use: Callable[[NetfilterQueueQueueHandle], Any],
        error: type[Exception],
        text: str,
    ) -> None:
        with pytest.raises(error, match=text):
            use(handle.create_queue(queue_num, ignore))

    @pytest.mark.parametrize(
        ("number", "callback", "error", "text"),
        [
            (65536, ignore, ValueError, "number is 65536, but must be from 0 to 65535"),
            (-1, ignore, ValueError, "number is -1"),
            ("1", ignore, TypeError, "number must be an integer"),
            (1, None, TypeError, "must be callable"),
            (1, asyncio.sleep, TypeError, "is a coroutine function"),
        ],
    )
    def test_wrong_argument_of_create_queue(
        self,
        handle: NetfilterQueueHandle,
        number: Any,
        callback: Any,
        error: type[Exception],
        text: str,
    ) -> None:
        with pytest.raises(error, match=text):
            handle.create_queue(number, callback)
        assert not bound_queues()

    def test_number_that_is_taken(self, handle: NetfilterQueueHandle, queue_num: int) -> None:
        queue = handle.create_queue(queue_num, accept)
        with pytest.raises(OSError, match="which is this very socket") as caught:
            handle.create_queue(queue_num, ignore)
        assert caught.value.errno == errno.EBUSY
        with NetfilterQueue() as other, pytest.raises(PermissionError, match="taken by port id"):
            other.bind(queue_num)
        queue.destroy()
        with NetfilterQueue() as other:
            other.bind(queue_num, sock_len=4096)
            with pytest.raises(PermissionError, match="taken by port id"):
                handle.create_queue(queue_num, ignore)
        handle.create_queue(queue_num, accept)

    def test_missing_capability_is_named(
        self, handle: NetfilterQueueHandle, queue_num: int
    ) -> None:
        queue = handle.create_queue(queue_num, ignore)
        with without_net_admin():
            for refused in (
                lambda: handle.create_queue(queue_num + 1, ignore),
                lambda: handle.bind_pf(socket.AF_INET),
                lambda: handle.unbind_pf(socket.AF_INET6),
                lambda: queue.set_maxlen(7),
                queue.destroy,
            ):
                with pytest.raises(PermissionError, match="CAP_NET_ADMIN is needed"):
                    refused()

    @pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
    def test_families_are_bound_as_often_as_one_likes(
        self, handle: NetfilterQueueHandle, family: int
    ) -> None:
        for change in (handle.unbind_pf, handle.bind_pf, handle.bind_pf, handle.unbind_pf):
            change(family)

    def test_queues_share_a_handle(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        """And a packet goes from one to the other."""
        other = queue_num + 10000
        order = []

        def pass_on(data: NetfilterQueueData) -> None:
            order.append("first")
            data.set_verdict(NF_QUEUE | other << 16)

        def let_go(data: NetfilterQueueData) -> None:
            order.append("second")
            data.set_verdict(NF_ACCEPT)

        handle.create_queue(queue_num, pass_on)
        handle.create_queue(other, let_go)
        flow = queued()
        flow.send(b"hello")
        loop_until(handle, lambda: len(order) == 2)
        assert order == ["first", "second"]
        assert flow.receive() == b"hello"

    def test_message_that_was_cut_short_is_decided(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        sizes = []

        def look(data: NetfilterQueueData) -> None:
            sizes.append(len(data.get_payload()))
            data.set_verdict(NF_ACCEPT)

        handle.create_queue(queue_num, look)
        flow.send(bytes(2000))
        with socket_of(handle) as sock:
            handle.handle_packet(sock.recv(1000))
        assert 0 < sizes[0] < 1000
        assert flow.receive() == bytes(2000)


class TestRequestsUnderTraffic:
    """Packets that are in the socket when the kernel's answer to a request is awaited."""

    def test_they_come_with_the_next_datagram(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        payloads = []

        def look(data: NetfilterQueueData) -> None:
            payloads.append(data.get_payload()[28:])
            data.set_verdict(NF_ACCEPT)

        queue = handle.create_queue(queue_num, look)
        flow = queued()
        sent = [b"%d" % number for number in range(20)]
        flow.send(*sent)
        wait_until_queued(queue_num, len(sent))
        queue.set_maxlen(100)
        assert payloads == []
        # The loop of the program has a reason to call handle_packet(), and needs but this one.
        with socket_of(handle) as sock:
            handle.handle_packet(sock.recv(65536))
        assert not is_readable(handle)
        assert payloads == sent == flow.receive_all(len(sent))

    def test_request_of_a_callback(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()

        def look(data: NetfilterQueueData) -> None:
            queue.set_maxlen(100)
            data.set_verdict(NF_ACCEPT)

        queue = handle.create_queue(queue_num, look)
        sent = [b"%d" % number for number in range(20)]
        flow.send(*sent)
        received: list[bytes] = []

        def all_arrived() -> bool:
            received.extend(flow.arrived())
            return len(received) == len(sent)

        loop_until(handle, all_arrived)
        assert received == sent

    def test_packets_of_a_destroyed_queue_are_not_the_next_ones(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        """Ids begin anew with each queue, so that an old packet's verdict would hit a new one."""
        other = queue_num + 10000
        seen = []

        def keeping(number: int) -> Callable[[NetfilterQueueData], None]:
            return lambda data: seen.append((number, data.get_payload()[28:]))

        handle.create_queue(other, keeping(other))
        queue = handle.create_queue(queue_num, fail)
        flow, other_flow = queued(), queued(number=other)
        flow.send(b"old")
        other_flow.send(b"1")
        wait_until_queued(other, 1)
        queue.destroy()
        handle.create_queue(queue_num, keeping(queue_num))
        flow.send(b"new")
        other_flow.send(b"2")
        loop_until(handle, lambda: len(seen) >= 3)
        assert seen == [(other, b"1"), (queue_num, b"new"), (other, b"2")]

    def test_destroying_executes_what_the_callback_has_set(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        ended: list[bool] = []

        def accept_and_end(data: NetfilterQueueData) -> None:
            data.set_verdict(NF_ACCEPT)
            queue.destroy()
            ended.append(True)
            with pytest.raises(RuntimeError, match=TOO_LATE):
                data.set_verdict(NF_DROP)

        queue = handle.create_queue(queue_num, accept_and_end)
        flow = queued()
        flow.send(b"hello")
        loop_until(handle, lambda: ended)
        assert flow.receive() == b"hello"

    def test_another_thread_is_in_recv(
        self, handle: NetfilterQueueHandle, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        """It may get the answers, and the packets go on meanwhile; those that a request has set
        aside can overtake the one that the thread has received but not passed on yet."""
        flow = queued()
        stopping = threading.Event()

        def loop() -> None:
            with socket_of(handle) as sock:
                # What made it readable can be an answer, which the other thread takes.
                sock.setblocking(False)
                while not stopping.is_set():
                    if select.select([sock], [], [], 0.01)[0]:
                        with contextlib.suppress(BlockingIOError):
                            handle.handle_packet(sock.recv(65536))

        queue = handle.create_queue(queue_num, accept)
        looping = in_thread(loop)
        try:
            for number in range(200):
                flow.send(b"%d" % number)
                queue.set_maxlen(100 + number)
            sent = [b"%d" % number for number in range(200)]
            assert sorted(flow.receive_all(200)) == sorted(sent)
            queue.destroy()
            assert queue_num not in bound_queues()
        finally:
            stopping.set()
            looping.result(TIMEOUT)

"""What a queue is set to besides its number: flags at `bind()`, and changes while it is bound."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from messages import unbind_request
from netfilterqueue import COPY_META, COPY_NONE, COPY_PACKET, NetfilterQueue, Packet
from support import (
    CHAINS,
    RECEIVE_BUFFER,
    TIMEOUT,
    bound_queues,
    in_thread,
    numbered,
    readable,
    wait_until_blocked,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Node, Rule
    from support import QueuedUdp, Traffic, UdpFlow

FLAGS = ("fail_open", "gso", "conntrack", "uid_gid", "secctx")


def bind_with(queue: NetfilterQueue, number: int, **flags: bool) -> None:
    queue.bind(number, sock_len=RECEIVE_BUFFER, max_len=2, **flags)  # type: ignore[arg-type]


def bind_and_set(queue: NetfilterQueue, number: int, **flags: bool) -> None:
    bind_with(queue, number, **{name: not on for name, on in flags.items()})
    queue.set_flags(**flags)


# How a flag comes to be set on a bound queue.
SETTERS: dict[str, Callable[..., None]] = {"bind": bind_with, "set_flags": bind_and_set}


def lacks(flag: str) -> bool:
    with NetfilterQueue() as queue, contextlib.suppress(OSError):
        bind_with(queue, 0, **{flag: True})
        return False
    return True


@pytest.fixture
def lacking(router: Node) -> str:
    """A flag that this kernel lacks."""
    for flag in FLAGS:
        if lacks(flag):
            return flag
    pytest.skip("this kernel has all flags")


def send_what_may_be_dropped(flow: UdpFlow, *payloads: bytes) -> None:
    """A sender is told of a drop on its way out."""
    for payload in payloads:
        with contextlib.suppress(PermissionError):
            flow.send(payload)


@pytest.mark.parametrize("how", SETTERS)
class TestFlag:
    @pytest.fixture
    def set_flags(
        self, how: str, queue: NetfilterQueue, queue_num: int
    ) -> Callable[..., NetfilterQueue]:
        """Bind the queue, with these flags or with their opposite until they are set."""

        def set_flags(**flags: bool) -> NetfilterQueue:
            SETTERS[how](queue, queue_num, **flags)
            return queue

        return set_flags

    @pytest.mark.parametrize("on", [True, False])
    def test_uid_gid(
        self,
        set_flags: Callable[..., NetfilterQueue],
        queued: Callable[..., UdpFlow],
        on: bool,
    ) -> None:
        flow = queued(chain="OUTPUT")
        queue = set_flags(uid_gid=on)
        flow.send(b"payload")
        (packet,) = queue.read(timeout=TIMEOUT)
        assert [packet.uid is not None, packet.gid is not None] == [on, on]

    @pytest.mark.stock_kernel
    @pytest.mark.parametrize("on", [True, False])
    def test_conntrack(
        self,
        set_flags: Callable[..., NetfilterQueue],
        queued: Callable[..., UdpFlow],
        rules: Callable[..., Rule],
        on: bool,
    ) -> None:
        # The kernel tracks connections while there is a rule that wants to know.
        rules("OUTPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
        flow = queued(chain="OUTPUT")
        queue = set_flags(conntrack=on)
        flow.send(b"payload")
        (packet,) = queue.read(timeout=TIMEOUT)
        assert (packet.conntrack is not None) == on

    @pytest.mark.stock_kernel
    @pytest.mark.parametrize("on", [True, False])
    def test_secctx(
        self,
        set_flags: Callable[..., NetfilterQueue],
        queued: Callable[..., UdpFlow],
        rules: Callable[..., Rule],
        on: bool,
    ) -> None:
        # To AppArmor, which Debian's kernel starts with, this is the name of no restriction.
        label = ("-j", "SECMARK", "--selctx", "unconfined")
        rules("OUTPUT", "-p", "udp", "-m", "mark", "--mark", 7, *label, table="mangle")
        flow = queued(chain="OUTPUT")
        queue = set_flags(secctx=on)
        flow.send(b"unlabelled")
        flow.sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
        flow.send(b"labelled")
        packets = [*queue.read(1, timeout=TIMEOUT), *queue.read(1, timeout=TIMEOUT)]
        assert [packet.secctx for packet in packets] == [None, "unconfined" if on else None]

    @pytest.mark.parametrize("on", [True, False])
    def test_fail_open_accepts_what_a_full_queue_cannot_hold(
        self,
        set_flags: Callable[..., NetfilterQueue],
        queued: Callable[..., UdpFlow],
        queue_num: int,
        on: bool,
    ) -> None:
        flow = queued()
        queue = set_flags(fail_open=on)
        flow.send(*numbered(5))
        assert flow.arrived() == (numbered(5)[2:] if on else [])
        assert bound_queues()[queue_num].dropped_full == (0 if on else 3)
        for packet in queue.read(timeout=TIMEOUT):
            packet.accept()
        assert flow.receive_all(2) == numbered(2)

    @pytest.mark.parametrize("on", [True, False])
    def test_gso_leaves_packets_as_long_as_the_sender_made_them(
        self,
        set_flags: Callable[..., NetfilterQueue],
        queue_num: int,
        rules: Callable[..., Rule],
        traffic: Traffic,
        on: bool,
    ) -> None:
        rules(CHAINS["forward"], "-p", "tcp", queue=queue_num)
        queue = set_flags(gso=on)
        queue.set_max_len(1024)
        transfer = traffic.tcp("forward", bytes(400000))
        lengths = []
        while not transfer.done:
            for packet in queue.read(timeout=0.01):
                lengths.append(len(packet))
                packet.accept()
        assert len(transfer.result()) == 400000
        assert (max(lengths) > 1500) == on

    def test_flag_that_the_kernel_lacks_is_named_and_nothing_was_changed(
        self,
        how: str,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        lacking: str,
    ) -> None:
        flow = queued(chain="OUTPUT")
        with pytest.raises(OSError, match=f"this kernel lacks {lacking};") as caught:
            SETTERS[how](queue, queue_num, **{"uid_gid": True, lacking: True, "gso": True})
        assert caught.value.errno == errno.EOPNOTSUPP
        assert f"{lacking}=True takes" in str(caught.value)
        if how == "bind":
            assert not bound_queues()
            SETTERS[how](queue, queue_num)
        flow.send(b"payload")
        (packet,) = queue.read(timeout=TIMEOUT)
        assert packet.uid is None


class TestSetFlags:
    def test_others_stay_as_they_are(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued(chain="OUTPUT")
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER, uid_gid=True)
        queue.set_flags(fail_open=True)
        queue.set_flags(gso=False, fail_open=False)
        queue.set_flags()
        flow.send(b"payload")
        (packet,) = queue.read(timeout=TIMEOUT)
        assert packet.uid is not None

    def test_what_the_kernel_lacks_can_be_cleared(
        self, queue: NetfilterQueue, queue_num: int, lacking: str
    ) -> None:
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER, **{lacking: False})  # type: ignore[arg-type]
        queue.set_flags(**{lacking: False})

    def test_unknown_name(self, queue: NetfilterQueue, queue_num: int) -> None:
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        with pytest.raises(TypeError, match="unexpected keyword argument 'fail_closed'"):
            queue.set_flags(fail_closed=True)  # type: ignore[call-arg]

    def test_queue_that_shares_the_socket_keeps_its_flags_when_a_bind_fails(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], lacking: str
    ) -> None:
        flow = queued(chain="OUTPUT")
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        with NetfilterQueue(sockfd=queue.fileno()) as other:
            with pytest.raises(OSError, match=lacking):
                other.bind(
                    queue_num,
                    sock_len=RECEIVE_BUFFER,
                    uid_gid=True,
                    **{lacking: True},  # type: ignore[arg-type]
                )
        flow.send(b"payload")
        (packet,) = queue.read(timeout=TIMEOUT)
        assert packet.uid is None


class TestSetMode:
    @pytest.mark.parametrize(
        ("mode", "copy_range", "row", "length"),
        [
            (COPY_META, 0, (COPY_META, 0), 0),
            (COPY_PACKET, 20, (COPY_PACKET, 20), 20),
            (COPY_PACKET, 0, (COPY_PACKET, 65531), 9028),
            (COPY_PACKET, 2**32 - 1, (COPY_PACKET, 65531), 9028),
        ],
    )
    def test_it_holds_for_the_packets_that_come_next(
        self,
        queued_udp: Callable[..., QueuedUdp],
        queue_num: int,
        mode: int,
        copy_range: int,
        row: tuple[int, int],
        length: int,
    ) -> None:
        udp = queued_udp(range=40)
        assert len(udp.deliver_one(bytes(9000))) == 40
        udp.queue.set_mode(mode, copy_range)
        found = bound_queues()[queue_num]
        assert (found.copy_mode, found.copy_range) == row
        assert len(udp.deliver_one(bytes(9000))) == length

    def test_none_drops_all(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        queue.set_mode(COPY_NONE, 0)
        send_what_may_be_dropped(flow, b"payload")
        assert not readable(queue)

    def test_larger_packets_come_whole_to_a_thread_that_was_waiting(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, range=20, sock_len=RECEIVE_BUFFER)
        for length in (100, 5000, 60000):
            queue.set_mode(COPY_PACKET, 20)
            reading = in_thread(queue.read)
            wait_until_blocked(queue.get_fd())
            queue.set_mode(COPY_PACKET, 0)
            flow.send(bytes(length))
            (packet,) = reading.result(TIMEOUT)
            assert packet.get_payload()[28:] == bytes(length)
            packet.drop()


class TestSetMaxLen:
    def test_what_comes_on_top_is_dropped(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER, max_len=1)
        queue.set_max_len(3)
        flow.send(*numbered(5))
        row = bound_queues()[queue_num]
        assert (row.depth, row.dropped_full) == (3, 2)
        # What waits already stays.
        queue.set_max_len(1)
        assert len(queue.read(timeout=0)) == bound_queues()[queue_num].depth == 3


CHANGES: dict[str, Callable[[NetfilterQueue], None]] = {
    "set_mode": lambda queue: queue.set_mode(COPY_PACKET, 100),
    "set_max_len": lambda queue: queue.set_max_len(100),
    "set_flags": lambda queue: queue.set_flags(gso=True, uid_gid=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
class TestAnyChange:
    def test_packets_that_come_meanwhile_are_kept(
        self,
        queued: Callable[..., UdpFlow],
        queue: NetfilterQueue,
        queue_num: int,
        change: Callable[[NetfilterQueue], None],
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER, batch=4)
        for _ in range(3):
            flow.send(*numbered(10))
            # Its answer comes after them.
            change(queue)
            assert readable(queue)
            queue.run(block=False)
            assert flow.arrived() == numbered(10)
        assert not readable(queue)

    def test_in_the_callback(
        self,
        queued_udp: Callable[..., QueuedUdp],
        queue: NetfilterQueue,
        change: Callable[[NetfilterQueue], None],
    ) -> None:
        def change_and_accept(packet: Packet) -> None:
            change(queue)
            packet.accept()

        udp = queued_udp("loopback", change_and_accept, batch=4)
        udp.deliver(*numbered(10))
        assert udp.flow.receive_all(10) == numbered(10)

    def test_while_another_thread_waits_for_packets(
        self,
        queued_udp: Callable[..., QueuedUdp],
        queue: NetfilterQueue,
        change: Callable[[NetfilterQueue], None],
    ) -> None:
        udp = queued_udp("loopback", Packet.accept)
        running = in_thread(queue.run)
        for data in numbered(20):
            wait_until_blocked(queue.get_fd())
            udp.flow.send(data)
            change(queue)
            assert udp.flow.receive() == data
        queue.stop()
        running.result(TIMEOUT)

    def test_of_a_queue_that_is_not_bound(
        self, queue: NetfilterQueue, queue_num: int, change: Callable[[NetfilterQueue], None]
    ) -> None:
        with pytest.raises(RuntimeError, match=r"no queue is bound: call bind\(\) first"):
            change(queue)
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        queue.close()
        with pytest.raises(ValueError, match="this queue is closed"):
            change(queue)

    def test_that_the_kernel_refuses(
        self, queue: NetfilterQueue, queue_num: int, change: Callable[[NetfilterQueue], None]
    ) -> None:
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        with socket.socket(fileno=os.dup(queue.fileno())) as same_socket:
            same_socket.send(unbind_request(queue_num))
        with pytest.raises(OSError, match=f"of queue {queue_num}: the queue is not") as caught:
            change(queue)
        assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda queue: queue.set_mode(3, 0), ValueError, "mode is 3"),
        (lambda queue: queue.set_mode(COPY_META, -1), ValueError, "range is -1"),
        (lambda queue: queue.set_mode(COPY_META, 2**32), ValueError, "range is 4294967296"),
        (lambda queue: queue.set_mode(COPY_META, "1"), TypeError, "range must be an integer"),
        (lambda queue: queue.set_max_len(0), ValueError, "max_len is 0"),
        (lambda queue: queue.set_max_len(2**32), ValueError, "max_len is 4294967296"),
        (lambda queue: queue.set_max_len(None), TypeError, "max_len must be an integer"),
    ],
)
def test_wrong_argument_is_refused_before_anything_is_sent(
    queue: NetfilterQueue,
    queue_num: int,
    change: Callable[[NetfilterQueue], Any],
    error: type[Exception],
    text: str,
) -> None:
    queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
    before = bound_queues()
    with pytest.raises(error, match=text):
        change(queue)
    assert bound_queues() == before

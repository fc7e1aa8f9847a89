"""What can go wrong: arguments, rights, numbers that are taken, a second verdict."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import resource
import select
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest
from scapy.layers.inet import IP

from netfilterqueue import NetfilterQueue, Packet, Verdict, lowlevel, nflog
from support import bound_queues, run_until, wait_until_queued, without_net_admin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support import Program, QueuedUdp

TOO_LATE = "Parent queue has already been unbound"
SECOND = "Verdict already given for this packet"


def ignore(packet: Packet) -> None:
    """A callback that decides nothing."""


async def decide(packet: Packet) -> None:
    """What looks like a callback and is none."""
    packet.accept()


class Deciding:
    __call__ = decide


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """No file can be opened for a while."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(
    "open_socket", [NetfilterQueue, lowlevel.open, functools.partial(nflog.open, 1)]
)
def test_no_descriptor_is_left_for_a_socket(open_socket: Callable[[], object]) -> None:
    refused = pytest.raises(OSError, match="cannot open a netlink socket")
    with refused as caught, no_descriptors():
        open_socket()
    assert caught.value.errno == errno.EMFILE


@pytest.mark.parametrize("name", ["_receiver.Pulling", "_nflog.Messages"])
def test_loop_over_nothing_never_begins_nor_ends(name: str) -> None:
    module, _, kind = f"netfilterqueue.{name}".rpartition(".")
    with pytest.raises(TypeError, match="incorrect type"):
        getattr(sys.modules[module], kind)(None)


class TestArguments:
    """A refused argument is named with its value and range, before anything is sent."""

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"queue_num": -1}, "queue_num is -1, but must be from 0 to 65535"),
            ({"queue_num": 65536}, "queue_num is 65536, but must be from 0 to 65535"),
            ({"queue_num": 2**64}, f"queue_num is {2**64}, but must be from 0 to 65535"),
            ({"max_len": 0}, "max_len is 0, but must be from 1 to 4294967295"),
            ({"max_len": -5}, "max_len is -5, but must be from 1 to 4294967295"),
            ({"max_len": 2**32}, "max_len is 4294967296, but must be from 1 to 4294967295"),
            ({"mode": 3}, "mode is 3, but must be COPY_NONE (0), COPY_META (1) or COPY_PACKET (2)"),
            ({"mode": -1}, "mode is -1, but must be"),
            ({"mode": "packet"}, "mode is 'packet', but must be"),
            ({"mode": None}, "mode is None, but must be"),
            ({"range": -1}, "range is -1, but must be from 0 to 4294967295"),
            ({"range": 2**32}, "range is 4294967296, but must be from 0 to"),
            ({"sock_len": -1}, "sock_len is -1, but must be from 0 to 2147483647"),
            ({"sock_len": 2**31}, "sock_len is 2147483648, but must be from 0 to"),
            ({"batch": 0}, "batch is 0, but must be from 1 to 1024"),
            ({"batch": 1025}, "batch is 1025, but must be from 1 to 1024"),
            ({"verdict_delay": -0.5}, "verdict_delay is -0.5 seconds, but must be from 0 to 3600"),
            ({"verdict_delay": 1e9}, "verdict_delay is 1000000000.0 seconds, but must be from 0"),
            ({"verdict_delay": float("nan")}, "verdict_delay is nan seconds, but must be from 0"),
        ],
        ids=str,
    )
    def test_value_out_of_range(
        self, queue: NetfilterQueue, queue_num: int, arguments: dict[str, Any], text: str
    ) -> None:
        self.assert_refused(queue, queue_num, arguments, ValueError, text)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ({"queue_num": "1"}, "queue_num must be an integer, not str"),
            ({"queue_num": 1.0}, "queue_num must be an integer, not float"),
            ({"queue_num": None}, "queue_num must be an integer, not NoneType"),
            ({"max_len": "many"}, "max_len must be an integer, not str"),
            ({"range": b"20"}, "range must be an integer, not bytes"),
            ({"sock_len": 1e6}, "sock_len must be an integer, not float"),
            ({"batch": "8"}, "batch must be an integer, not str"),
            ({"verdict_delay": "soon"}, "verdict_delay must be a number of seconds, not str"),
            ({"user_callback": 7}, "the callback must be callable with one argument, the packet"),
            ({"user_callback": decide}, "the callback is a coroutine function, which nobody would"),
            ({"user_callback": functools.partial(decide)}, "take packets by `async for`"),
            ({"user_callback": Deciding()}, "the callback is a coroutine function"),
            ({"callback": ignore}, "user_callback and callback are the same argument"),
            ({"verdict_delay": "1"}, "verdict_delay must be a number of seconds, not str"),
        ],
        ids=str,
    )
    def test_value_of_wrong_type(
        self, queue: NetfilterQueue, queue_num: int, arguments: dict[str, Any], text: str
    ) -> None:
        self.assert_refused(queue, queue_num, arguments, TypeError, text)

    def assert_refused(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        arguments: dict[str, Any],
        error: type[Exception],
        text: str,
    ) -> None:
        with socket.socket(fileno=os.dup(queue.fileno())) as same_socket:
            buffer = same_socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            options: dict[str, Any] = {
                "queue_num": queue_num,
                "user_callback": ignore,
                "sock_len": 4096,
            }
            with pytest.raises(error, match=re.escape(text)):
                queue.bind(**{**options, **arguments})
            # Neither the socket was touched nor did the kernel have anything to answer.
            assert same_socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == buffer
            assert not select.select([queue], [], [], 0)[0]
        assert not bound_queues()
        queue.bind(**options)
        assert list(bound_queues()) == [queue_num]

    def test_handle_that_is_a_coroutine_function(self, queue_num: int) -> None:
        class Waiting(NetfilterQueue):
            handle = decide  # type: ignore[assignment]

        with Waiting() as queue:
            with pytest.raises(TypeError, match=r"handle\(\) is a coroutine function"):
                queue.bind(queue_num, sock_len=4096)
            assert not bound_queues()
            queue.bind(queue_num, ignore, sock_len=4096)

    @pytest.mark.parametrize(
        ("method", "argument", "error", "text"),
        [
            (Packet.set_payload, b"", ValueError, "must have 1 to 65531; use drop() to discard"),
            (Packet.set_payload, bytes(65532), ValueError, "a payload of 65532 bytes cannot be"),
            (Packet.set_payload, "text", TypeError, "must be a bytes-like object, not 'str'"),
            (Packet.set_payload, IP(), TypeError, "not 'IP'; of a packet that scapy has made"),
            (Packet.set_mark, -1, OverflowError, "mark -1 does not fit into 32 bits: use 0 to"),
            (Packet.set_mark, 2**32, OverflowError, "mark 4294967296 does not fit into 32 bits"),
            (Packet.set_mark, "1", TypeError, ", not str"),
        ],
        ids=[
            *("no payload", "long payload", "text", "packet of scapy"),
            *("negative mark", "great mark", "text as mark"),
        ],
    )
    def test_value_that_a_packet_refuses_changes_nothing(
        self,
        queued_udp: Callable[..., QueuedUdp],
        method: Callable[[Packet, Any], None],
        argument: object,
        error: type[Exception],
        text: str,
    ) -> None:
        udp = queued_udp(callback=Packet.retain)
        packet = udp.deliver_one(b"as it came")
        with pytest.raises(error, match=re.escape(text)):
            method(packet, argument)
        assert packet.verdict is None
        packet.accept()
        assert udp.flow.receive() == b"as it came"

    def test_bind_with_an_unknown_option(self, queue: NetfilterQueue, queue_num: int) -> None:
        with pytest.raises(TypeError, match="fail_often"):
            queue.bind(queue_num, ignore, fail_often=True)  # type: ignore[call-arg]
        assert not bound_queues()

    @pytest.mark.parametrize("method", ["run", "run_socket"])
    def test_running_what_is_not_bound(self, queue: NetfilterQueue, method: str) -> None:
        arguments = [queue] if method == "run_socket" else []
        with pytest.raises(RuntimeError, match=re.escape("no queue is bound: call bind() first")):
            getattr(queue, method)(*arguments)

    @pytest.mark.parametrize(
        "use",
        [
            lambda queue: queue.bind(1, ignore),
            lambda queue: queue.run(),
            lambda queue: queue.run_socket(queue),
            lambda queue: queue.fileno(),
            lambda queue: queue.get_fd(),
        ],
        ids=["bind", "run", "run_socket", "fileno", "get_fd"],
    )
    def test_using_what_is_closed(self, use: Callable[[NetfilterQueue], object]) -> None:
        queue = NetfilterQueue()
        queue.close()
        with pytest.raises(ValueError, match="this queue is closed: make a new NetfilterQueue"):
            use(queue)

    def test_second_bind(self, queue: NetfilterQueue, queue_num: int) -> None:
        queue.bind(queue_num, ignore, sock_len=4096)
        with pytest.raises(
            RuntimeError, match=re.escape("A queue is already bound; use unbind() first")
        ):
            queue.bind(queue_num + 1, ignore, sock_len=4096)
        assert list(bound_queues()) == [queue_num]


class TestCapability:
    def test_bind_names_the_capability(self, queue: NetfilterQueue, queue_num: int) -> None:
        with without_net_admin(), pytest.raises(PermissionError) as caught:
            queue.bind(queue_num, ignore, sock_len=4096)
        assert caught.value.errno == errno.EPERM
        assert f"Failed to create queue {queue_num}" in str(caught.value)
        assert "CAP_NET_ADMIN" in str(caught.value)
        assert "setcap cap_net_admin+ep" in str(caught.value)
        assert not bound_queues()
        # With the capability the same object can be bound.
        queue.bind(queue_num, ignore, sock_len=4096)
        assert list(bound_queues()) == [queue_num]

    def test_bind_names_the_capability_also_where_the_number_is_taken(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, ignore, sock_len=4096)
        with NetfilterQueue() as second, without_net_admin():
            with pytest.raises(PermissionError, match="CAP_NET_ADMIN"):
                second.bind(queue_num, ignore, sock_len=4096)

    def test_bind_by_the_root_of_another_user_namespace(
        self, run_program: Callable[..., Program], queue_num: int
    ) -> None:
        # It has every capability there, and none over this network.
        program = run_program(
            """
            import ctypes, sys
            from netfilterqueue import NetfilterQueue
            CLONE_NEWUSER = 0x10000000
            assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0
            try:
                NetfilterQueue().bind(int(sys.argv[1]), print, sock_len=4096)
            except PermissionError as error:
                print(error)
            """,
            str(queue_num),
        )
        assert "CAP_NET_ADMIN is needed in the socket's network namespace" in program.run()

    def test_error_of_a_verdict_that_lacks_it_comes_from_the_next_call(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp()
        packet = udp.deliver_one(b"late")
        with without_net_admin():
            packet.accept()
        with pytest.raises(PermissionError) as caught:
            udp.queue.run(block=False)
        assert caught.value.errno == errno.EPERM
        assert "still undecided" in str(caught.value)
        assert packet.verdict is None
        udp.queue.run(block=False)  # once is enough
        packet.accept()
        assert packet.verdict == Verdict.ACCEPT
        assert udp.flow.receive() == b"late"

    def test_error_of_a_batch_that_lacks_it_concerns_all_its_packets(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp(verdict_delay=60)
        packets = udp.deliver(b"1", b"2", b"3", b"4")
        with without_net_admin():
            for packet in packets:
                packet.accept()
        with pytest.raises(PermissionError):
            udp.queue.run(block=False)
        assert [packet.verdict for packet in packets] == [None] * 4
        for packet in packets:
            packet.accept()
        assert udp.flow.receive_all(4) == [b"1", b"2", b"3", b"4"]

    def test_error_of_an_earlier_verdict_comes_from_another_packet(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        errors: list[PermissionError] = []

        def accept_the_second(packet: Packet) -> None:
            if len(udp.packets) == 2:
                with pytest.raises(PermissionError) as caught:
                    packet.accept()
                errors.append(caught.value)
                packet.accept()

        udp = queued_udp(callback=accept_the_second)
        first = udp.deliver_one(b"first")
        with without_net_admin():
            first.accept()
        udp.flow.send(b"second")
        wait_until_queued(queue_num, 2)
        # One read brings the kernel's answer and the second packet.
        udp.queue.run(block=False)
        assert [error.errno for error in errors] == [errno.EPERM]
        assert first.verdict is None
        first.accept()
        assert udp.flow.receive_all(2) == [b"second", b"first"]

    def test_other_packets_of_the_loop_are_not_lost(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def accept_without_right_the_third(packet: Packet) -> None:
            packet.retain()
            with without_net_admin() if len(udp.packets) == 3 else contextlib.nullcontext():
                packet.accept()

        udp = queued_udp(callback=accept_without_right_the_third, verdict_delay=0)
        payloads = [bytes([number]) for number in range(8)]
        udp.flow.send(*payloads)
        with pytest.raises(PermissionError):
            run_until(udp.queue, lambda: len(udp.packets) > len(payloads))
        run_until(udp.queue, lambda: len(udp.packets) == len(payloads))
        assert [packet.verdict for packet in udp.packets].count(None) == 1
        assert udp.packets[2].verdict is None
        udp.packets[2].accept()
        assert sorted(udp.flow.receive_all(8)) == payloads

    def test_unbind_names_the_capability(self, queue: NetfilterQueue, queue_num: int) -> None:
        queue.bind(queue_num, ignore, sock_len=4096)
        with without_net_admin(), pytest.raises(PermissionError, match="CAP_NET_ADMIN"):
            queue.unbind()
        # The socket's end is the queue's end, for which nobody is asked.
        queue.close()
        assert not bound_queues()


class TestNumberTaken:
    def test_by_another_process(
        self, run_program: Callable[..., Program], queue: NetfilterQueue, queue_num: int
    ) -> None:
        program = run_program(
            """
            import sys
            from netfilterqueue import NetfilterQueue
            queue = NetfilterQueue()
            queue.bind(int(sys.argv[1]), print, sock_len=4096)
            print("bound")
            queue.run()
            """,
            str(queue_num),
        )
        program.wait_for("bound")
        port_id = bound_queues()[queue_num].port_id
        with pytest.raises(PermissionError) as caught:
            queue.bind(queue_num, ignore, sock_len=4096)
        assert caught.value.errno == errno.EPERM
        text = str(caught.value)
        assert (
            f"Failed to create queue {queue_num}: the number is taken by port id {port_id}" in text
        )
        assert "end that program or use another number" in text
        assert port_id == program.process.pid
        assert f"probably process {port_id} (python" in text
        # The other one still has it, and this one may have another.
        assert bound_queues()[queue_num].port_id == port_id
        queue.bind(queue_num + 30000, ignore, sock_len=4096)

    def test_by_another_queue_of_this_process(
        self, queue: NetfilterQueue, queue_num: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue.bind(queue_num, ignore, sock_len=4096)
        port_id = bound_queues()[queue_num].port_id
        with NetfilterQueue() as second:
            with pytest.raises(PermissionError, match=f"taken by port id {port_id}"):
                second.bind(queue_num, ignore, sock_len=4096)
            # As it is when that socket was the process's first.
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: port_id)
                with pytest.raises(PermissionError, match="a socket of this very program; close"):
                    second.bind(queue_num, ignore, sock_len=4096)
            queue.unbind()
            second.bind(queue_num, ignore, sock_len=4096)

    def test_by_the_same_socket(self, queue: NetfilterQueue, queue_num: int) -> None:
        queue.bind(queue_num, ignore, sock_len=4096)
        port_id = bound_queues()[queue_num].port_id
        with NetfilterQueue(sockfd=queue.fileno()) as second:
            with pytest.raises(OSError, match=f"taken by port id {port_id}") as caught:
                second.bind(queue_num, ignore, sock_len=4096)
            assert caught.value.errno == errno.EBUSY
            assert f"Failed to create queue {queue_num}" in str(caught.value)
        assert list(bound_queues()) == [queue_num]


class TestVerdictTooMuch:
    VERDICTS = (Packet.accept, Packet.drop, Packet.repeat)

    @pytest.mark.parametrize("second", VERDICTS)
    @pytest.mark.parametrize("first", [Packet.accept, Packet.drop])
    def test_second_verdict(
        self,
        queued_udp: Callable[..., QueuedUdp],
        first: Callable[[Packet], None],
        second: Callable[[Packet], None],
    ) -> None:
        udp = queued_udp()
        packet = udp.deliver_one(b"once")
        first(packet)
        given = packet.verdict
        with pytest.raises(RuntimeError, match=SECOND):
            second(packet)
        assert packet.verdict == given
        # In the end the first one has been carried out.
        udp.deliver_one(b"next").accept()
        arrived = udp.flow.receive_all(2 if given == Verdict.ACCEPT else 1)
        assert arrived[-1] == b"next"

    @pytest.mark.parametrize("verdict", VERDICTS)
    def test_verdict_after_unbind(
        self, queued_udp: Callable[..., QueuedUdp], verdict: Callable[[Packet], None]
    ) -> None:
        udp = queued_udp()
        packet = udp.deliver_one()
        udp.queue.unbind()
        with pytest.raises(RuntimeError, match=TOO_LATE):
            verdict(packet)
        assert packet.verdict is None

    def test_verdict_after_a_later_bind(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        udp = queued_udp()
        old = udp.deliver_one(b"old")
        udp.queue.unbind()
        new: list[Packet] = []
        udp.queue.bind(queue_num, new.append, sock_len=4096)
        udp.flow.send(b"new")
        run_until(udp.queue, lambda: new)
        # The kernel counts anew: were it sent, this verdict would decide the other packet.
        assert old.id == new[0].id
        with pytest.raises(RuntimeError, match=TOO_LATE):
            old.accept()
        assert udp.flow.arrived() == []
        new[0].accept()
        assert udp.flow.receive() == b"new"

    def test_second_verdict_is_told_before_the_unbinding(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp()
        packet = udp.deliver_one()
        packet.drop()
        udp.queue.unbind()
        with pytest.raises(RuntimeError, match=SECOND):
            packet.drop()

"""`run()`: what it delivers, when it returns, and what becomes of exceptions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet
from support import (
    CHAINS,
    RECEIVE_BUFFER,
    SOON,
    TIMEOUT,
    accepting,
    in_thread,
    numbered,
    readable,
    udp_data,
    wait_until_blocked,
    wait_until_polling,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Program, UdpFlow

SOL_NETLINK, NETLINK_NO_ENOBUFS = 270, 5  # <linux/socket.h>, <linux/netlink.h>

both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])


class Stopped(BaseException):
    """Stands for what is no Exception, as KeyboardInterrupt and SystemExit are not."""


class TestDelivery:
    @both_families
    @pytest.mark.parametrize("path", CHAINS)
    def test_callback_gets_each_packet_once_in_the_order_sent(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        path: str,
        ipv6: bool,
    ) -> None:
        seen: list[bytes] = []
        flow = queued(path, ipv6=ipv6)
        queue.bind(queue_num, accepting(seen))
        flow.send(*numbered(5))
        wait_until_queued(queue_num, 5)
        queue.run(block=False)
        assert seen == numbered(5)
        assert flow.receive_all(5) == numbered(5)
        assert flow.arrived() == []

    def test_one_queue_gets_ipv4_and_ipv6(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        protocols = []

        def accept(packet: Packet) -> None:
            protocols.append(packet.hw_protocol)
            packet.accept()

        flows = [queued(ipv6=ipv6) for ipv6 in (False, True)]
        queue.bind(queue_num, accept)
        for flow in flows:
            flow.send(b"payload")
        queue.run(block=False)
        assert protocols == [0x0800, 0x86DD]
        assert [flow.receive() for flow in flows] == [b"payload", b"payload"]

    def test_overridden_handle_gets_the_packets_of_a_queue_bound_without_callback(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        class Accepting(NetfilterQueue):
            def handle(self, packet: Packet) -> None:
                packet.accept()
                self.stop()

        flow = queued()
        with Accepting() as queue:
            queue.bind(queue_num)
            flow.send(b"payload")
            queue.run()
        assert flow.receive() == b"payload"


class TestWithoutBlocking:
    @pytest.mark.parametrize("block", [False, 0, None, "", []])
    def test_any_false_value_handles_all_that_is_pending_and_returns_none(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        block: Any,
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept)
        flow.send(*numbered(100))  # several reads
        result: Any = queue.run(block)  # type: ignore[func-returns-value]
        assert result is None
        assert flow.arrived() == numbered(100)

    @pytest.mark.parametrize("count", [31, 32, 33, 64])
    def test_read_that_fills_the_batch_exactly_is_not_waited_after(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], count: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept)
        flow.send(*numbered(count))
        in_thread(queue.run, False).result(TIMEOUT)
        assert flow.arrived() == numbered(count)

    def test_returns_when_nothing_is_pending(self, queue: NetfilterQueue, queue_num: int) -> None:
        queue.bind(queue_num, Packet.accept)
        in_thread(queue.run, False).result(TIMEOUT)

    @pytest.mark.parametrize("at_first", [64, 8])
    def test_flood_ends_it_after_as_many_packets_as_can_have_been_pending(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        at_first: int,
    ) -> None:
        flow = queued()
        seen: list[bytes] = []
        accept = accepting(seen, lambda: flow.send(b"another"))
        queue.bind(queue_num, accept, max_len=at_first, batch=16)
        queue.set_max_len(64)
        flow.send(*numbered(60))
        in_thread(queue.run, False).result(TIMEOUT)
        assert seen == numbered(60) + [b"another"] * 4
        assert readable(queue), "event loops come back for the others"

    def test_polling_takes_each_packet_as_it_comes(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept)
        for data in numbered(10):
            flow.send(data)
            queue.run(False)
            assert flow.arrived() == [data]


class TestBlocking:
    def test_waits_for_packets_until_stopped(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept)
        running = in_thread(queue.run)
        for data in numbered(3):
            wait_until_blocked(queue.get_fd())
            flow.send(data)
            assert flow.receive() == data
        wait_until_blocked(queue.get_fd())
        assert not running.done()
        queue.stop()
        assert running.result(TIMEOUT) is None

    def test_returns_when_nothing_is_pending_on_a_descriptor_made_non_blocking(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept)
        with socket.fromfd(queue.get_fd(), socket.AF_UNIX, socket.SOCK_STREAM) as duplicate:
            duplicate.setblocking(False)
            flow.send(*numbered(40))
            in_thread(queue.run).result(TIMEOUT)
            assert flow.arrived() == numbered(40)
            duplicate.setblocking(True)
        running = in_thread(queue.run)
        wait_until_blocked(queue.get_fd())
        queue.stop()
        running.result(TIMEOUT)

    @pytest.mark.parametrize("blocking", [True, False])
    def test_overrun_of_the_receive_buffer_never_surfaces(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        blocking: bool,
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept, sock_len=8192)
        with socket.fromfd(queue.get_fd(), socket.AF_UNIX, socket.SOCK_STREAM) as duplicate:
            # Ask for the error that the library has switched off.
            duplicate.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 0)
        flow.send(*numbered(100))
        if blocking:
            running = in_thread(queue.run)
            wait_until_queued(queue_num, 0)
        else:
            queue.run(block=False)
        arrived = flow.arrived()
        assert 0 < len(arrived) < 100, "the buffer was not overrun"
        flow.send(b"later")
        if blocking:
            assert flow.receive() == b"later"
            queue.stop()
            running.result(TIMEOUT)
        else:
            queue.run(block=False)
            assert flow.arrived() == [b"later"]


class TestLimits:
    @pytest.fixture
    def seen(self, queue: NetfilterQueue, queue_num: int) -> list[bytes]:
        """What the callback of `queue` has accepted."""
        seen: list[bytes] = []
        queue.bind(queue_num, accepting(seen), sock_len=RECEIVE_BUFFER)
        return seen

    @pytest.mark.parametrize("block", [True, False])
    def test_count_ends_it_and_leaves_the_rest(
        self, queue: NetfilterQueue, seen: list[bytes], queued: Callable[..., UdpFlow], block: bool
    ) -> None:
        queued().send(*numbered(5))
        queue.run(block, count=2)
        assert seen == numbered(2)
        assert readable(queue)
        queue.run(block, count=3)
        assert seen == numbered(5)

    def test_count_is_of_packets_of_any_number_of_reads(
        self, queue: NetfilterQueue, seen: list[bytes], queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        running = in_thread(lambda: queue.run(count=5))
        for data in numbered(5):
            flow.send(data)
            flow.receive()
        running.result(TIMEOUT)
        assert seen == numbered(5)

    @pytest.mark.parametrize("timeout", [0, SOON])
    def test_timeout_ends_it(
        self,
        queue: NetfilterQueue,
        seen: list[bytes],
        queued: Callable[..., UdpFlow],
        timeout: float,
    ) -> None:
        queued().send(*numbered(3))
        start = time.monotonic()
        queue.run(timeout=timeout)
        assert timeout <= time.monotonic() - start < TIMEOUT
        assert seen == numbered(3)

    def test_timeout_ends_it_while_packets_keep_coming(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()

        def send_another(packet: Packet) -> None:
            packet.drop()
            flow.send(b"again")

        queue.bind(queue_num, send_another, sock_len=RECEIVE_BUFFER)
        flow.send(b"hello")
        in_thread(lambda: queue.run(timeout=SOON)).result(TIMEOUT)

    def test_timeout_yields_to_stop(self, queue: NetfilterQueue, seen: list[bytes]) -> None:
        running = in_thread(lambda: queue.run(timeout=2 * TIMEOUT))
        wait_until_polling()
        queue.stop()
        running.result(TIMEOUT)

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"count": 0}, ValueError),
            ({"count": "1"}, TypeError),
            ({"timeout": -1}, ValueError),
            ({"timeout": "soon"}, TypeError),
        ],
        ids=str,
    )
    def test_wrong_argument_is_named(
        self,
        queue: NetfilterQueue,
        seen: list[bytes],
        options: dict[str, Any],
        error: type[Exception],
    ) -> None:
        with pytest.raises(error, match=next(iter(options))):
            queue.run(**options)


class TestExceptionOfTheCallback:
    @pytest.mark.parametrize("exception", [ValueError, Stopped])
    @pytest.mark.parametrize("position", range(8))
    def test_at_any_position_loses_no_packet_and_delivers_none_twice(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        position: int,
        exception: type[BaseException],
    ) -> None:
        seen: list[bytes] = []
        refused: list[Packet] = []

        def accept(packet: Packet) -> None:
            seen.append(udp_data(packet))
            if udp_data(packet) == b"%d" % position and not refused:
                refused.append(packet)
                raise exception("from the callback")
            packet.accept()

        flow = queued()
        queue.bind(queue_num, accept)
        flow.send(*numbered(8))
        with pytest.raises(exception, match="from the callback"):
            queue.run()
        assert seen == numbered(position + 1)
        assert flow.arrived() == numbered(position), "what was decided before has been sent"
        assert readable(queue) == (position < 7)

        (packet,) = refused
        assert packet.verdict is None
        assert udp_data(packet) == b"%d" % position
        packet.accept()
        queue.run(block=False)
        assert seen == numbered(8)
        assert sorted(flow.arrived()) == [
            data for data in numbered(8) if data not in numbered(position)
        ]
        assert not readable(queue)
        wait_until_queued(queue_num, 0)

    def test_in_each_callback_lets_each_run_deliver_one_packet(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        def accept(packet: Packet) -> None:
            packet.accept()
            raise ValueError

        flow = queued()
        queue.bind(queue_num, accept)
        flow.send(*numbered(8))
        for data in numbered(8):
            assert readable(queue)
            with pytest.raises(ValueError, match=r"^$"):
                queue.run()
            assert flow.arrived() == [data]
        queue.run(block=False)
        assert not readable(queue)

    def test_leaves_the_packets_that_came_meanwhile_for_after_the_rest(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        seen = []

        def accept(packet: Packet) -> None:
            packet.accept()
            seen.append(udp_data(packet))
            if len(seen) == 1:
                raise ValueError

        flow = queued()
        queue.bind(queue_num, accept)
        flow.send(b"first", b"second", b"third")
        with pytest.raises(ValueError, match=r"^$"):
            queue.run()
        flow.send(b"fourth", b"fifth")
        queue.run(block=False)
        assert seen == flow.arrived() == [b"first", b"second", b"third", b"fourth", b"fifth"]

    def test_lets_a_loop_around_run_go_on(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        """What services write: `while True: try: queue.run()`, with the error logged."""
        errors = 0

        def accept(packet: Packet) -> None:
            packet.accept()
            if int(udp_data(packet)) % 3 == 0:
                raise ValueError

        def loop() -> None:
            nonlocal errors
            while True:
                with contextlib.suppress(ValueError):
                    queue.run()
                    return
                errors += 1

        flow = queued()
        queue.bind(queue_num, accept)
        looping = in_thread(loop)
        flow.send(*numbered(100))
        assert flow.receive_all(100) == numbered(100)
        wait_until_blocked(queue.get_fd())
        queue.stop()
        looping.result(TIMEOUT)
        assert errors == 34

    def test_does_not_keep_the_event_loop_from_the_rest_of_the_read(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        errors: list[BaseException] = []
        seen = []

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: errors.append(context["exception"]))
            done = asyncio.Event()

            def accept(packet: Packet) -> None:
                packet.accept()
                seen.append(udp_data(packet))
                if len(seen) == 5:
                    done.set()
                raise ValueError

            queue.bind(queue_num, accept)
            flow.send(*numbered(5))
            loop.add_reader(queue.get_fd(), functools.partial(queue.run, block=False))
            await asyncio.wait_for(done.wait(), TIMEOUT)
            loop.remove_reader(queue.get_fd())

        flow = queued()
        asyncio.run(main())
        assert seen == flow.receive_all(5) == numbered(5)
        assert [type(error) for error in errors] == [ValueError] * 5


class TestEventLoops:
    def test_asyncio_add_reader(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        async def main() -> None:
            loop = asyncio.get_running_loop()
            done = asyncio.Event()

            def accept(packet: Packet) -> None:
                packet.accept()
                if udp_data(packet) == b"49":
                    done.set()

            queue.bind(queue_num, accept)
            loop.add_reader(queue.get_fd(), functools.partial(queue.run, block=False))
            flow.send(*numbered(50))
            await asyncio.wait_for(done.wait(), TIMEOUT)
            loop.remove_reader(queue.get_fd())

        flow = queued()
        asyncio.run(main())
        assert flow.receive_all(50) == numbered(50)

    def test_trio_wait_readable(
        self,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        run_program: Callable[..., Program],
    ) -> None:
        flow = queued()
        program = run_program(
            """
            import sys
            import trio
            from netfilterqueue import NetfilterQueue

            def accept(packet):
                global left
                packet.accept()
                left -= 1

            async def main():
                print("started")
                while left:
                    await trio.lowlevel.wait_readable(queue.get_fd())
                    queue.run(block=False)

            left = 50
            with NetfilterQueue() as queue:
                queue.bind(int(sys.argv[1]), accept)
                trio.run(main)
            """,
            str(queue_num),
        )
        program.wait_for("started")
        flow.send(*numbered(50))
        assert flow.receive_all(50) == numbered(50)
        program.run()

    def test_select_takes_the_queue_itself(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept)
        assert not readable(queue)
        flow.send(b"payload")
        assert readable(queue)
        queue.run(block=False)
        assert not readable(queue)


class TestSeveralRuns:
    def test_of_one_queue_in_two_threads_deliver_each_packet_once(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        seen: dict[int, list[bytes]] = {}
        together = threading.Barrier(2, timeout=TIMEOUT)

        def accept(packet: Packet) -> None:
            mine = seen.setdefault(threading.get_ident(), [])
            mine.append(udp_data(packet))
            if len(mine) == 1:
                together.wait()  # until the other thread has a packet too
            packet.accept()

        flow = queued()
        # Each read brings one packet, so that neither thread takes all.
        queue.bind(queue_num, accept, batch=1)
        running = [in_thread(queue.run), in_thread(queue.run)]
        wait_until_blocked(queue.get_fd(), threads=2)
        flow.send(*numbered(200))
        assert sorted(flow.receive_all(200)) == sorted(numbered(200))
        queue.stop()
        for run in running:
            run.result(TIMEOUT)
        assert len(seen) == 2
        assert sorted(itertools.chain(*seen.values())) == sorted(numbered(200))
        assert flow.arrived() == []

    def test_of_one_queue_nested_in_its_callback_go_on_with_the_next_packet(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        begun, ended = [], []

        def accept(packet: Packet) -> None:
            begun.append(udp_data(packet))
            if len(begun) in (1, 3):
                queue.run(block=False)
            packet.accept()
            ended.append(udp_data(packet))

        flow = queued()
        queue.bind(queue_num, accept)
        flow.send(*numbered(5))
        queue.run(block=False)
        assert begun == numbered(5)
        assert ended == [b"1", b"3", b"4", b"2", b"0"]
        assert flow.arrived() == ended, "verdicts leave in the order given"
        assert not readable(queue)

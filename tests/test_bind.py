"""`bind()`: its arguments, what the kernel is told, and the receive buffer."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import socket
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import COPY_META, COPY_NONE, COPY_PACKET, NetfilterQueue, Packet
from support import (
    TIMEOUT,
    bound_queues,
    in_thread,
    numbered,
    readable,
    run_until,
    udp_data,
    wait_until_blocked,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Node, Rule
    from support import Program, Traffic, UdpFlow

MEBIBYTE = 1 << 20
DEFAULT_SOCK_LEN = 2455552
LARGEST_RANGE = 65531

# More than the kernel grants to anybody.
TOO_MUCH = 1024 * MEBIBYTE

BURSTS = 10
BURST = 4000  # packets; fewer than a receive buffer of 4 MiB holds

accept = Packet.accept


def receive_buffer(queue: NetfilterQueue) -> int:
    with socket.socket(fileno=os.dup(queue.get_fd())) as duplicate:
        return duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def line_after(function: Callable[..., object]) -> int:
    """The number of the line after the one where the function's definition begins."""
    return inspect.getsourcelines(function)[1] + 1


class TestArguments:
    @pytest.mark.parametrize(
        "arguments",
        [
            (accept,),
            (accept, 100),
            (accept, 16, COPY_PACKET),
            (accept, 4096, COPY_PACKET, 65535),
            (accept, 4096, COPY_PACKET, 65535, 65536),
        ],
        ids=len,
    )
    @pytest.mark.parametrize("path", ["loopback", "forward"])
    def test_positional(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        path: str,
        arguments: tuple[Any, ...],
    ) -> None:
        flow = queued(path)
        queue.bind(queue_num, *arguments)
        flow.send(b"payload")
        wait_until_queued(queue_num, 1)
        queue.run(block=False)
        assert flow.receive() == b"payload"

    @pytest.mark.parametrize("name", ["user_callback", "callback"])
    def test_keywords(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], name: str
    ) -> None:
        flow = queued()
        callback: dict[str, Any] = {name: accept}
        queue.bind(
            **callback,
            sock_len=65536,
            range=100,
            mode=NetfilterQueue.COPY_PACKET,
            max_len=4096,
            queue_num=queue_num,
        )
        flow.send(b"payload")
        queue.run(block=False)
        assert flow.receive() == b"payload"
        assert bound_queues()[queue_num].copy_range == 100
        assert receive_buffer(queue) == 2 * 65536

    @pytest.mark.parametrize("number", [0, 65535])
    def test_first_and_last_queue_number(
        self,
        queue: NetfilterQueue,
        number: int,
        queued: Callable[..., UdpFlow],
    ) -> None:
        flow = queued(number=number)
        queue.bind(number, accept)
        flow.send(b"payload")
        queue.run(block=False)
        assert flow.receive() == b"payload"

    def test_numbers_may_be_anything_with_an_index(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        class Number:
            def __index__(self) -> int:
                return queue_num

        queue.bind(Number(), accept)  # type: ignore[arg-type]
        assert list(bound_queues()) == [queue_num]

    @pytest.mark.parametrize("queue_num_of_classic", [65536, 65537, -1])
    def test_queue_number_does_not_wrap_round(
        self, queue: NetfilterQueue, queue_num_of_classic: int
    ) -> None:
        with pytest.raises(ValueError, match="queue_num"):
            queue.bind(queue_num_of_classic, accept)
        assert bound_queues() == {}

    def test_callback_that_is_not_callable_is_refused_by_bind_and_not_by_the_first_packet(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        with pytest.raises(TypeError, match="callable"):
            queue.bind(queue_num, "accept")  # type: ignore[arg-type]
        assert bound_queues() == {}


class TestWhatTheKernelIsTold:
    @pytest.mark.parametrize("max_len", [1, 3])
    def test_packets_over_max_len_are_dropped(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], max_len: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, accept, max_len)
        flow.send(*numbered(5))
        row = bound_queues()[queue_num]
        assert (row.depth, row.dropped_full) == (max_len, 5 - max_len)
        queue.run(block=False)
        assert flow.arrived() == numbered(max_len)

    def test_max_len_is_1024_by_default(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.drop)
        flow.send(*numbered(1030))
        row = bound_queues()[queue_num]
        assert (row.depth, row.dropped_full, row.dropped_socket) == (1024, 6, 0)

    @pytest.mark.parametrize(
        ("asked", "told"),
        [(65535, LARGEST_RANGE), (LARGEST_RANGE, LARGEST_RANGE), (0, LARGEST_RANGE), (20, 20)],
    )
    def test_range(self, queue: NetfilterQueue, queue_num: int, asked: int, told: int) -> None:
        queue.bind(queue_num, accept, range=asked)
        row = bound_queues()[queue_num]
        assert (row.copy_mode, row.copy_range) == (COPY_PACKET, told)

    def test_whole_packet_is_copied_by_default(self, queue: NetfilterQueue, queue_num: int) -> None:
        queue.bind(queue_num, accept)
        row = bound_queues()[queue_num]
        assert (row.copy_mode, row.copy_range) == (COPY_PACKET, LARGEST_RANGE)

    @pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
    def test_range_is_not_clipped_so_that_the_largest_packet_comes_whole(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], ipv6: bool
    ) -> None:
        seen = []

        def keep(packet: Packet) -> None:
            seen.append(udp_data(packet))
            packet.accept()

        flow = queued(ipv6=ipv6)
        queue.bind(queue_num, keep)
        data = os.urandom(LARGEST_RANGE - (48 if ipv6 else 28))
        flow.send(data)
        queue.run(block=False)
        assert seen == [data]
        assert flow.receive() == data

    @pytest.mark.parametrize("mode", [COPY_META, COPY_NONE])
    def test_mode(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], mode: int
    ) -> None:
        lengths = []

        def keep(packet: Packet) -> None:
            lengths.append(packet.get_payload_len())
            packet.accept()

        flow = queued()
        queue.bind(queue_num, keep, 16, mode)
        assert bound_queues()[queue_num].copy_mode == mode
        flow.send(b"payload")
        queue.run(block=False)
        # In COPY_NONE the kernel drops every packet.
        assert (lengths, flow.arrived()) == (([0], [b"payload"]) if mode == COPY_META else ([], []))

    def test_takes_effect_as_a_whole_so_that_no_packet_is_lost_meanwhile(
        self,
        router: Node,
        queue: NetfilterQueue,
        queue_num: int,
        traffic: Traffic,
        rules: Callable[..., Rule],
        run_program: Callable[..., Program],
    ) -> None:
        """With a request for each setting there would be a moment in which the kernel knows the
        queue, but not the copy mode, and drops what comes."""
        flow = traffic.udp()
        match = ("INPUT", "-p", "udp", "--dport", flow.port)
        rules(*match, queue=queue_num, bypass=True, table="mangle")
        rules(*match, "-j", "DROP")  # counts the packets that come so far
        sender = run_program(
            f"""
            import signal
            import socket
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            print("ready")
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sender.connect(("127.0.0.1", {flow.port}))
            for burst in range({BURSTS}):
                signal.sigwait([signal.SIGUSR1])
                print("begins", burst)
                for _ in range({BURST}):
                    sender.send(b"payload")
                print("ended", burst)
            """
        )
        sender.wait_for("ready")
        queued = []
        for burst in range(BURSTS):
            sender.process.send_signal(signal.SIGUSR1)
            sender.wait_for(f"begins {burst}\n")
            queue.bind(queue_num, accept, 65535, sock_len=4 * MEBIBYTE)
            sender.wait_for(f"ended {burst}\n")
            queued.append(bound_queues()[queue_num].depth)
            queue.run(block=False)
            queue.unbind()
        sender.run()
        assert [count for count in queued if 0 < count < BURST], "bind() did not come in a burst"
        listed = router.run(["iptables", "-v", "-n", "-x", "-L", "INPUT"]).stdout
        assert int(listed.splitlines()[2].split()[0]) == BURSTS * BURST

    def test_packets_that_come_before_the_kernels_answer_is_read_are_kept(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        flow = queued()
        clock = time.monotonic
        sent: list[bytes] = []

        def monotonic() -> float:
            # bind() reads the clock after its request was carried out and before it reads on.
            if not sent and queue_num in bound_queues():
                sent.extend(numbered(20))  # fewer than a read takes
                flow.send(*sent)
            return clock()

        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", monotonic)
            queue.bind(queue_num, accept)
        assert sent, "bind() did not read the clock"
        assert readable(queue)
        queue.run(block=False)
        assert flow.arrived() == sent
        assert not readable(queue)


class TestOrderOfThings:
    def test_rule_may_come_after_bind(
        self, queue: NetfilterQueue, queue_num: int, traffic: Traffic, rules: Callable[..., Rule]
    ) -> None:
        flow = traffic.udp()
        queue.bind(queue_num, accept)
        rules("INPUT", "-p", "udp", "--dport", flow.port, queue=queue_num)
        flow.send(b"payload")
        wait_until_queued(queue_num, 1)
        queue.run(block=False)
        assert flow.receive() == b"payload"

    def test_socket_is_there_before_bind_and_the_same_after_it(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        before = (queue.get_fd(), queue.fileno())
        assert not readable(queue)
        assert not os.get_inheritable(queue.get_fd())
        flow = queued()
        queue.bind(queue_num, accept)
        assert (queue.get_fd(), queue.fileno()) == before
        flow.send(b"payload")
        assert readable(queue)
        queue.unbind()
        assert (queue.get_fd(), queue.fileno()) == before

    @pytest.mark.parametrize("step", [0, 1], ids=["the same number", "another number"])
    def test_bind_unbind_bind_works(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        step: int,
    ) -> None:
        seen: list[tuple[str, bytes]] = []

        def keep(name: str, packet: Packet) -> None:
            seen.append((name, udp_data(packet)))
            packet.accept()

        other = queue_num + 30000 * step
        flow, next_flow = queued(), queued(number=other)
        queue.bind(queue_num, functools.partial(keep, "first"), 1, COPY_PACKET, 100, batch=2)
        flow.send(b"accepted")
        queue.run(block=False)
        flow.send(b"left behind")
        queue.unbind()
        queue.bind(other, functools.partial(keep, "second"))
        next_flow.send(b"payload")
        queue.run(block=False)
        assert seen == [("first", b"accepted"), ("second", b"payload")]
        row = bound_queues()[other]
        assert (row.copy_range, row.depth) == (LARGEST_RANGE, 0)

    def test_second_bind_is_refused_and_the_first_stays_in_force(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        queue.bind(queue_num, accept)
        for number in (queue_num, queue_num + 30000):
            with pytest.raises(RuntimeError) as caught:
                queue.bind(number, Packet.drop)
            assert str(caught.value) == "A queue is already bound; use unbind() first"
        flow.send(b"payload")
        queue.run(block=False)
        assert flow.receive() == b"payload"

    def test_number_that_is_taken_is_an_os_error_and_another_one_can_be_bound(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, accept)
        with NetfilterQueue() as second:
            with pytest.raises(OSError, match=f"Failed to create queue {queue_num}"):
                second.bind(queue_num, accept)
            second.bind(queue_num + 30000, accept)
            assert set(bound_queues()) == {queue_num, queue_num + 30000}

    def test_reader_of_an_earlier_binding_does_not_take_packets_of_the_next(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        seen = []

        def drop(packet: Packet) -> None:
            packet.drop()

        def keep(packet: Packet) -> None:
            seen.append(udp_data(packet))
            packet.accept()

        flow = queued()
        for data in numbered(50):
            queue.bind(queue_num, drop)
            running = in_thread(queue.run)
            wait_until_blocked(queue.get_fd())
            queue.unbind()
            queue.bind(queue_num, keep)
            flow.send(data)
            running.result(TIMEOUT)
            run_until(queue, flow.arrived)
            queue.unbind()
        assert seen == numbered(50)


class TestReceiveBuffer:
    def test_has_the_default_size_without_a_warning(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, accept)
        assert receive_buffer(queue) == 2 * DEFAULT_SOCK_LEN

    def test_has_the_size_asked_for_also_where_it_is_smaller_than_the_system_default(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, accept, sock_len=10000)
        assert receive_buffer(queue) == 20000

    def test_smaller_than_asked_is_a_warning_at_the_callers_line_and_the_queue_works(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        def bind() -> None:
            queue.bind(queue_num, accept, sock_len=TOO_MUCH)

        flow = queued()
        with pytest.warns(RuntimeWarning) as caught:
            bind()
        (warning,) = caught
        assert str(warning.message) == (
            f"Socket rcvbuf limit is now {receive_buffer(queue)}, requested {TOO_MUCH}."
        )
        assert (warning.filename, warning.lineno) == (__file__, line_after(bind))
        flow.send(b"payload")
        queue.run(block=False)
        assert flow.receive() == b"payload"

    def test_warning_of_a_subclass_is_at_the_line_of_its_call(self, queue_num: int) -> None:
        class Binding(NetfilterQueue):
            def bind_much(self) -> None:
                self.bind(queue_num, accept, sock_len=TOO_MUCH)

        with Binding() as queue, pytest.warns(RuntimeWarning, match="rcvbuf limit") as caught:
            queue.bind_much()
        (warning,) = caught
        assert (warning.filename, warning.lineno) == (__file__, line_after(Binding.bind_much))

    def test_where_warnings_are_errors_the_queue_is_unbound_again(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning, match="rcvbuf limit"):
                queue.bind(queue_num, accept, sock_len=TOO_MUCH)
            assert bound_queues() == {}
            queue.bind(queue_num, accept)
        assert set(bound_queues()) == {queue_num}

    @pytest.mark.real_root
    def test_of_the_real_root_may_be_larger_than_the_limit(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, accept, sock_len=64 * MEBIBYTE)
        assert receive_buffer(queue) == 128 * MEBIBYTE


class TestSubclass:
    def test_may_have_arguments_of_its_own(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        class Counting(NetfilterQueue):
            def __init__(self, start: int, *, step: int) -> None:
                super().__init__()
                self.count, self.step = start, step

            def handle(self, packet: Packet) -> None:
                self.count += self.step
                packet.accept()

        flow = queued()
        with Counting(10, step=5) as queue:
            queue.bind(queue_num)
            flow.send(b"one", b"two")
            queue.run(block=False)
        assert flow.arrived() == [b"one", b"two"]
        assert queue.count == 20

    def test_need_not_call_the_constructor(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        class Printer(NetfilterQueue):
            def __init__(self, name: str, *others: str) -> None:
                self.names = [name, *others]

            def handle(self, packet: Packet) -> None:
                self.names.append(udp_data(packet).decode())
                packet.accept()

        flow = queued()
        queue = Printer("first", "second")
        assert queue.get_fd() >= 0
        queue.bind(queue_num)
        flow.send(b"payload")
        queue.run(block=False)
        queue.close()
        assert flow.arrived() == [b"payload"]
        assert queue.names == ["first", "second", "payload"]

    @pytest.mark.parametrize(
        "use",
        [NetfilterQueue.unbind, NetfilterQueue.close, NetfilterQueue.stop, NetfilterQueue.fileno],
        ids=lambda method: method.__name__,
    )
    def test_that_does_not_call_the_constructor_can_be_used_before_bind(
        self, use: Callable[[NetfilterQueue], object]
    ) -> None:
        class Silent(NetfilterQueue):
            def __init__(self) -> None:
                pass

        use(Silent())

    def test_callback_goes_before_handle(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        class Dropping(NetfilterQueue):
            def handle(self, packet: Packet) -> None:
                packet.drop()

        flow = queued()
        with Dropping() as queue:
            queue.bind(queue_num, accept)
            flow.send(b"payload")
            queue.run(block=False)
        assert flow.arrived() == [b"payload"]

    def test_handle_that_calls_the_inherited_one_is_told_to_override_it(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        class Forgetful(NetfilterQueue):
            def handle(self, packet: Packet) -> None:
                super().handle(packet)

        flow = queued()
        with Forgetful() as queue:
            queue.bind(queue_num)
            flow.send(b"payload")
            with pytest.raises(NotImplementedError, match="override handle"):
                queue.run()

    def test_of_another_class_too_is_initialised_in_order(self, queue_num: int) -> None:
        class Named:
            def __init__(self, name: str) -> None:
                self.name = name

        class NamedQueue(NetfilterQueue, Named):
            def __init__(self, name: str) -> None:
                NetfilterQueue.__init__(self)
                Named.__init__(self, name)

        with NamedQueue("left") as queue:
            queue.bind(queue_num, accept)
            assert set(bound_queues()) == {queue_num}
            assert queue.name == "left"

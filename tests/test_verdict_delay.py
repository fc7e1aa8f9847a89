"""When a verdict is sent: at once, together with others, or by the helper thread in time.

What is sent on loopback has been delivered when the send returns: what has not arrived was not
sent. The bound is measured by the kernel, which stamps what arrives at a host: this process,
whose GIL is held meanwhile, looks at the stamps later.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import NetfilterQueue, Packet
from support import (
    TIMEOUT,
    in_thread,
    numbered,
    udp_data,
    wait_until,
    wait_until_blocked,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Program, Traffic, UdpFlow

DEFAULT_DELAY = 0.001  # seconds
BOUND = 0.050  # seconds, for the default delay
BUSY = 1.0  # seconds
NEVER = 3600  # seconds: as verdict_delay, longer than any test

SO_TIMESTAMPNS = 35  # <asm-generic/socket.h>

IDLE = """
    import sys
    from netfilterqueue import NetfilterQueue, Packet
    queue = NetfilterQueue()
    queue.bind(int(sys.argv[1]), Packet.accept)
    print("bound")
    queue.run()
"""


def receive_with_time(flow: UdpFlow) -> tuple[bytes, float]:
    """A datagram of a `timed` flow, and when the kernel received it."""
    size = struct.calcsize("ll")  # struct timespec
    data, ((_, _, stamp),), _, _ = flow.receiver.recvmsg(100, socket.CMSG_SPACE(size))
    seconds, nanoseconds = struct.unpack("ll", stamp)
    return data, seconds + nanoseconds / 1e9


@pytest.fixture
def timed(queued: Callable[..., UdpFlow], traffic: Traffic) -> Callable[..., UdpFlow]:
    """As `queued`, with arrival times. Not for loopback: there they are from before the queue."""

    def start(path: str, *, ipv6: bool = False) -> UdpFlow:
        flow, probe = queued(path, ipv6=ipv6), traffic.udp()
        for each in (flow, probe):
            each.receiver.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

        def stamps_on_arrival() -> bool:
            probe.send(b"probe")
            arrived_before = time.time()
            return receive_with_time(probe)[1] < arrived_before

        # For a moment after it was asked to, the kernel still stamps what is read instead.
        wait_until(stamps_on_arrival)
        return flow

    return start


def sleep() -> None:
    time.sleep(BUSY)


def compute() -> None:
    """A loop that the interpreter never takes the GIL from."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(100)
    deadline = time.monotonic() + BUSY
    while time.monotonic() < deadline:
        pass
    sys.setswitchinterval(before)


def call_c_that_keeps_the_gil() -> None:
    ctypes.PyDLL(None).usleep(int(BUSY * 1e6))


@pytest.fixture
def kept(queue: NetfilterQueue, queue_num: int) -> Callable[..., list[Packet]]:
    """Bind the queue and return the packets of one read, none of them decided."""

    def deliver(
        flow: UdpFlow, *payloads: bytes, verdict_delay: float = DEFAULT_DELAY
    ) -> list[Packet]:
        packets: list[Packet] = []
        queue.bind(queue_num, packets.append, verdict_delay=verdict_delay)
        flow.send(*payloads)
        wait_until_queued(queue_num, len(payloads))
        queue.run(block=False)
        return packets

    return deliver


class TestBound:
    @pytest.mark.parametrize(
        ("hold_up", "path", "ipv6"),
        [
            (sleep, "output", False),
            (compute, "forward", True),
            (call_c_that_keeps_the_gil, "forward", False),
        ],
    )
    def test_verdict_is_not_held_up_by_the_callback_of_the_next_packet(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        timed: Callable[..., UdpFlow],
        hold_up: Callable[[], None],
        path: str,
        ipv6: bool,
    ) -> None:
        accepted: list[float] = []

        def accept(packet: Packet) -> None:
            if accepted:
                hold_up()
                queue.stop()
            accepted.append(time.time())
            packet.accept()

        flow = timed(path, ipv6=ipv6)
        queue.bind(queue_num, accept)
        flow.send(b"first", b"second")
        wait_until_queued(queue_num, 2)
        queue.run()
        data, arrived = receive_with_time(flow)
        assert data == b"first"
        assert 0 <= arrived - accepted[0] < BOUND
        data, arrived = receive_with_time(flow)
        assert data == b"second"
        assert arrived - accepted[0] >= BUSY

    @pytest.mark.parametrize("running", [True, False], ids=["while run waits", "without run"])
    def test_verdict_given_after_the_callback_does_not_wait_for_the_undecided(
        self,
        queue: NetfilterQueue,
        kept: Callable[..., list[Packet]],
        timed: Callable[..., UdpFlow],
        running: bool,
    ) -> None:
        flow = timed("output")
        packets = kept(flow, *numbered(8))
        if running:
            run = in_thread(queue.run)
            wait_until_blocked(queue.get_fd())
        for number in (5, 2, 7):
            accepted = time.time()
            packets[number].accept()
            data, arrived = receive_with_time(flow)
            assert data == b"%d" % number
            assert 0 <= arrived - accepted < BOUND
            # For so long that the helper goes to sleep in between.
            time.sleep(0.030)
        if running:
            queue.stop()
            run.result(TIMEOUT)


class TestAtOnce:
    def test_only_packet_of_a_read(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        arrived: list[list[bytes]] = []

        def accept(packet: Packet) -> None:
            packet.accept()
            arrived.append(flow.arrived())

        flow = queued()
        queue.bind(queue_num, accept, verdict_delay=NEVER)
        for data in numbered(3):
            flow.send(data)
            queue.run(block=False)
        assert arrived == [[data] for data in numbered(3)]

    @pytest.mark.parametrize("options", [{"verdict_delay": 0}, {"batch": 1}], ids=str)
    def test_every_packet_if_asked_for(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        options: dict[str, int],
    ) -> None:
        arrived: list[list[bytes]] = []

        def accept(packet: Packet) -> None:
            packet.accept()
            arrived.append(flow.arrived())

        flow = queued()
        queue.bind(queue_num, accept, **options)  # type: ignore[arg-type]
        flow.send(*numbered(8))
        queue.run(block=False)
        assert arrived == [[data] for data in numbered(8)]

    def test_last_packet_of_a_read_that_is_decided(
        self, kept: Callable[..., list[Packet]], queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        packets = kept(flow, *numbered(3), verdict_delay=NEVER)
        packets[2].accept()
        packets[0].drop()
        assert flow.arrived() == []
        packets[1].accept()
        assert flow.arrived() == [b"2", b"1"]

    def test_after_those_given_before_it_to_packets_of_other_reads(
        self,
        queue: NetfilterQueue,
        kept: Callable[..., list[Packet]],
        queued: Callable[..., UdpFlow],
    ) -> None:
        flow = queued()
        packets = kept(flow, *numbered(2), verdict_delay=NEVER)
        flow.send(b"2")
        queue.run(block=False)
        packets[1].accept()
        assert flow.arrived() == []
        packets[2].accept()
        assert flow.arrived() == [b"1", b"2"]


class TestTogether:
    def test_those_of_a_read_are_sent_with_the_last(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        arrived: list[int] = []

        def accept(packet: Packet) -> None:
            packet.accept()
            arrived.append(len(flow.arrived()))

        flow = queued()
        queue.bind(queue_num, accept, batch=8, verdict_delay=NEVER)
        flow.send(*numbered(16))
        queue.run(block=False)
        assert arrived == 2 * [0, 0, 0, 0, 0, 0, 0, 8]

    @pytest.mark.parametrize("block", [True, False])
    def test_those_given_when_the_loop_goes_back_to_read_do_not_wait_for_the_undecided(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow], block: bool
    ) -> None:
        packets: list[Packet] = []

        def keep_the_last(packet: Packet) -> None:
            if udp_data(packet) == b"4":
                packets.append(packet)
            else:
                packet.accept()

        flow = queued()
        queue.bind(queue_num, keep_the_last, verdict_delay=NEVER)
        flow.send(*numbered(5))
        running = in_thread(queue.run, block)
        assert flow.receive_all(4) == numbered(4)
        packets[0].accept()
        assert flow.receive() == b"4"
        queue.stop()
        running.result(TIMEOUT)

    def test_what_leaves_run_sends_those_given(
        self, queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        def leave_at_some(packet: Packet) -> None:
            packet.accept()
            if udp_data(packet) == b"2":
                raise ValueError
            if udp_data(packet) == b"4":
                queue.stop()

        flow = queued()
        queue.bind(queue_num, leave_at_some, verdict_delay=NEVER)
        flow.send(*numbered(7))
        with pytest.raises(ValueError, match=r"^$"):
            queue.run()
        assert flow.arrived() == numbered(7)[:3]
        queue.run()
        assert flow.arrived() == numbered(7)[3:5]
        queue.unbind()
        assert flow.arrived() == []


class TestIdle:
    def test_bound_queue_without_traffic_makes_no_system_call(
        self,
        queue_num: int,
        queued: Callable[..., UdpFlow],
        run_program: Callable[..., Program],
    ) -> None:
        flow = queued()
        program = run_program(IDLE, str(queue_num))
        program.wait_for("bound")
        threads = Path(f"/proc/{program.process.pid}/task")

        def activity() -> dict[str, tuple[str, ...]]:
            """How often each thread has slept or was interrupted, its time, and where it is."""
            seen: dict[str, tuple[str, ...]] = {}
            for thread in threads.iterdir():
                status = (thread / "status").read_text(encoding="ascii").splitlines()
                switches = [line for line in status if "ctxt_switches" in line]
                times = (thread / "stat").read_text(encoding="ascii").split()[13:15]
                call = (thread / "syscall").read_text(encoding="ascii")
                seen[(thread / "comm").read_text().strip()] = (*switches, *times, call)
            return seen

        def quiet_for(seconds: float) -> bool:
            before = activity()
            time.sleep(seconds)
            return activity() == before

        def helper_has_work() -> bool:
            flow.send(*numbered(20))
            assert flow.receive_all(20) == numbered(20)
            return "nfqueue-verdict" in activity()

        wait_until(helper_has_work, what="a read brings several packets")
        wait_until(lambda: quiet_for(0.1), what="the helper sleeps without a timer")
        assert quiet_for(1.0)
        # It is not dead.
        flow.send(*numbered(20))
        assert flow.receive_all(20) == numbered(20)

"""What can go wrong while packets come and go: sending, verdicts refused later, a full buffer."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict
from support import (
    TIMEOUT,
    bound_queues,
    in_thread,
    numbered,
    run_until,
    udp_data,
    wait_until,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.testing import Node
    from support import Program, QueuedUdp, UdpFlow

SOL_NETLINK = 270
NETLINK_NO_ENOBUFS = 5


class TestSendFails:
    """Somebody closed the descriptor: a subprocess, where nothing else can get its number."""

    PROGRAM = """
    import asyncio, errno, os, sys, time
    from pathlib import Path
    from netfilterqueue import NetfilterQueue

    def depth():
        rows = Path("/proc/net/netfilter/nfnetlink_queue").read_text().splitlines()
        return [int(row.split()[2]) for row in rows if row.split()[0] == sys.argv[1]][0]

    packets = []
    queue = NetfilterQueue()
    queue.bind(int(sys.argv[1]), {callback}, sock_len=65536, verdict_delay={delay})
    print("bound")
    while depth() < {count}:
        time.sleep(0.001)
    {take}
    os.close(queue.get_fd())

    def attempt(call, *arguments):
        try:
            call(*arguments)
        except OSError as error:
            print(call.__name__, errno.errorcode[error.errno], error)

    """

    @pytest.fixture
    def program(
        self, run_program: Callable[..., Program], queued: Callable[..., UdpFlow], queue_num: int
    ) -> Callable[..., Program]:
        """Start it with so many packets, and an end of its own."""

        def start(
            end: str,
            *,
            count: int,
            delay: float,
            callback: str = "packets.append",
            take: str = "queue.run(block=False)",
        ) -> Program:
            flow = queued()
            settings = {"count": count, "delay": delay, "callback": callback, "take": take}
            started = run_program(self.PROGRAM.format(**settings) + end, str(queue_num))
            started.wait_for("bound")
            flow.send(*[b"hello"] * count)
            return started

        return start

    def test_the_call_that_sent_raises(self, program: Callable[..., Program]) -> None:
        end = """
    attempt(packets[0].accept)
    assert packets[0].verdict is None
    attempt(packets[0].drop)
    assert packets[0].verdict is None
    attempt(queue.close)
    """
        ended = program(end, count=1, delay=0)
        lines = ended.run().splitlines()[1:]
        assert [line.split()[:2] for line in lines] == [
            ["accept", "EBADF"],
            ["drop", "EBADF"],
            ["close", "EBADF"],
        ]
        assert "verdicts could not be sent: Bad file descriptor" in lines[0]
        assert "The packets concerned are still undecided" in lines[0]

    def test_the_next_call_raises_where_the_helper_sent(
        self, program: Callable[..., Program]
    ) -> None:
        end = """
    packets[0].accept()
    while packets[0].verdict is not None:
        time.sleep(0.001)
    attempt(packets[1].accept)
    assert packets[1].verdict is None
    attempt(queue.close)
    """
        ended = program(end, count=3, delay=0.001)
        line, _ = ended.run().splitlines()[1:]
        assert line.startswith("accept EBADF [Errno 9] verdicts could not be sent")

    def test_run_raises(self, program: Callable[..., Program]) -> None:
        end = """
    attempt(queue.run)
    attempt(queue.close)
    """
        ended = program(end, count=1, delay=0)
        line, _ = ended.run().splitlines()[1:]
        assert line.startswith("run EBADF [Errno 9] cannot read from the netlink socket")

    @pytest.mark.parametrize("read", ["queue.read(1)", "loop.run_until_complete(queue.aread(1))"])
    def test_read_returns_the_packets_it_took_and_a_later_call_raises(
        self, program: Callable[..., Program], read: str
    ) -> None:
        end = f"""
    packets[0].accept()
    packets += {read}
    assert packets[0].verdict is None
    attempt(packets[1].accept)
    print([packet.id for packet in packets])
    loop.close()
    attempt(queue.close)
    """
        take = "packets += queue.read(1); loop = asyncio.new_event_loop()"
        ended = program(end, count=3, delay=60, callback="None", take=take)
        error, ids, _ = ended.run().splitlines()[1:]
        assert error.startswith("accept EBADF [Errno 9] verdicts could not be sent")
        assert ids == "[1, 2]"


@pytest.fixture
def doomed_interface(router: Node) -> Iterator[str]:
    """An interface of the router on the way to 203.0.113.2, to be taken down."""
    for command in (
        "link add doomed type veth peer name other",
        "address add 203.0.113.1/24 dev doomed",
        "link set doomed up",
        "link set other up",
    ):
        router.run(["ip", *command.split()])
    yield "doomed"
    # A test may have deleted it, and with it its other end.
    router.run(["ip", "link", "delete", "doomed"], check=False)


# Ways for packets to leave a queue by themselves.
LEAVING = {
    "interface goes down": "ip link set doomed down",
    "interface is deleted": "ip link delete doomed",
    "unrelated table is deleted": (
        "nft add table ip t; nft add chain ip t c { type filter hook input priority 9\\; };"
        " nft delete table ip t"
    ),
}


class TestRefusedLater:
    """A verdict for a packet that has left the queue: the kernel's answer never ends the loop."""

    @pytest.fixture
    def lost_udp(
        self,
        queued_udp: Callable[..., QueuedUdp],
        queue_num: int,
        rules: Callable[..., object],
        router: Node,
        doomed_interface: str,
    ) -> Callable[..., QueuedUdp]:
        """Deliver packets that then leave the queue by themselves."""

        def deliver(count: int, how: str = "interface goes down") -> QueuedUdp:
            udp = queued_udp(callback=Packet.retain)
            rules("OUTPUT", "-o", doomed_interface, queue=queue_num)
            with router.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(count):
                    sender.sendto(b"lost", ("203.0.113.2", 9))
            run_until(udp.queue, lambda: len(udp.packets) == count)
            router.run(["sh", "-c", LEAVING[how]])
            wait_until_queued(queue_num, 0)
            return udp

        return deliver

    @pytest.mark.parametrize("how", LEAVING)
    def test_it_is_counted_and_good_ones_apply(
        self, lost_udp: Callable[..., QueuedUdp], queue_num: int, how: str
    ) -> None:
        udp = lost_udp(3, how)
        lost = list(udp.packets)
        good = udp.deliver(*numbered(3))
        # Nothing tells a packet that it has left.
        assert [(packet.verdict, udp_data(packet)) for packet in lost] == [(None, b"lost")] * 3
        for one, other in zip(lost, good):
            one.accept()
            other.accept()
        assert udp.flow.receive_all(3) == numbered(3)
        udp.deliver_one(b"after").accept()
        assert udp.flow.receive() == b"after"
        found = udp.queue.stats()
        assert found.verdict_errors == {errno.ENOENT: 3}
        assert (found.verdicts[Verdict.ACCEPT], found.request_errors) == (7, 0)
        assert found.kernel is not None
        assert found.kernel.depth == 0
        # The verdict was given, whatever became of the packet.
        for packet in lost:
            assert packet.verdict == Verdict.ACCEPT
            with pytest.raises(RuntimeError, match="Verdict already given"):
                packet.drop()
            assert packet.get_payload_len() == 32

    def test_blocked_loop_goes_on(self, lost_udp: Callable[..., QueuedUdp]) -> None:
        udp = lost_udp(2)
        lost = list(udp.packets)
        running = in_thread(udp.queue.run)
        for packet in lost:
            packet.drop()
        udp.flow.send(b"after")
        wait_until(lambda: len(udp.packets) > len(lost))
        udp.packets[-1].accept()
        assert udp.flow.receive() == b"after"
        assert not running.done()
        udp.queue.stop()
        assert running.result(TIMEOUT) is None


class TestOverrun:
    @pytest.fixture(params=[1, 0], ids=["as bound", "with ENOBUFS"])
    def overrun(
        self,
        request: pytest.FixtureRequest,
        queued_udp: Callable[..., QueuedUdp],
        queue: NetfilterQueue,
        queue_num: int,
    ) -> QueuedUdp:
        """A queue that has lost packets to a receive buffer which is still full.

        Somebody who has the socket too may want to hear of that, by an error from reading.
        """
        with socket.socket(fileno=os.dup(queue.fileno())) as same_socket:
            same_socket.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, request.param)
        udp = queued_udp(callback=Packet.accept, max_len=100000)
        udp.queue.unbind()

        def keep(packet: Packet) -> None:
            udp.packets.append(packet)
            packet.accept()

        udp.queue.bind(queue_num, keep, max_len=100000, sock_len=4096)
        while bound_queues()[queue_num].dropped_socket < 3:
            udp.flow.send(*[b"flood"] * 100)
        return udp

    def test_loop_goes_on(self, overrun: QueuedUdp) -> None:
        overrun.queue.run(block=False)
        assert len(overrun.packets) > 0
        assert overrun.deliver_one(b"after").verdict == Verdict.ACCEPT
        assert overrun.flow.arrived()[-1] == b"after"

    def test_blocked_loop_goes_on(self, overrun: QueuedUdp) -> None:
        running = in_thread(overrun.queue.run)
        wait_until(overrun.flow.arrived)
        overrun.flow.send(b"after")
        wait_until(lambda: b"after" in overrun.flow.arrived())
        assert not running.done()
        overrun.queue.stop()
        assert running.result(TIMEOUT) is None

    def test_run_socket_goes_on(self, overrun: QueuedUdp) -> None:
        with socket.socket(fileno=os.dup(overrun.queue.fileno())) as same_socket:
            same_socket.setblocking(False)
            overrun.queue.run_socket(same_socket)
            overrun.flow.send(b"after")
            overrun.queue.run_socket(same_socket)
        assert overrun.flow.arrived()[-1] == b"after"

    def test_queue_can_be_unbound(self, overrun: QueuedUdp, queue_num: int) -> None:
        overrun.queue.unbind()
        assert not bound_queues()

    def test_queue_can_be_stopped_while_it_runs(self, overrun: QueuedUdp) -> None:
        running = in_thread(overrun.queue.run)
        wait_until(overrun.flow.arrived)
        overrun.queue.stop()
        assert running.result(TIMEOUT) is None

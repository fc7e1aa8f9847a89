"""What becomes of packets that nobody decides: a default verdict, or a warning."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict
from support import (
    RECEIVE_BUFFER,
    TIMEOUT,
    bound_queues,
    in_thread,
    numbered,
    run_until,
    wait_until,
    without_net_admin,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from messages import Wire
    from support import Program, QueuedUdp, UdpFlow

ABANDONED = "a packet was let go of undecided, and stays in the kernel's queue"


@contextlib.contextmanager
def warnings_told() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield told


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What could not be raised."""
    errors: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: errors.append(hook.exc_value))
    return errors


class TestGiven:
    @pytest.mark.parametrize("verdict", [Verdict.ACCEPT, Verdict.STOP, Verdict.DROP])
    def test_to_packets_of_a_callback_that_decides_nothing(
        self,
        queued: Callable[..., UdpFlow],
        queue: NetfilterQueue,
        queue_num: int,
        verdict: Verdict,
    ) -> None:
        flow = queued()
        queue.bind(queue_num, lambda packet: None, sock_len=RECEIVE_BUFFER, default_verdict=verdict)
        with warnings_told() as told:
            flow.send(*numbered(40))
            queue.run(block=False)
        assert not told
        assert flow.arrived() == ([] if verdict is Verdict.DROP else numbered(40))
        found = queue.stats()
        assert found.kernel is not None
        assert found.kernel.depth == 0
        assert (found.abandoned, found.verdicts[verdict]) == (40, 40)

    def test_to_packets_of_a_callback_that_fails(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        def fail(packet: Packet) -> None:
            raise ZeroDivisionError

        flow = queued()
        queue.bind(
            queue_num,
            fail,
            sock_len=RECEIVE_BUFFER,
            default_verdict=Verdict.ACCEPT,
        )
        flow.send(b"1")
        with pytest.raises(ZeroDivisionError):
            queue.run(block=False)
        gc.collect()
        assert flow.receive() == b"1"

    def test_repeat(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        seen = []

        def mark_first(packet: Packet) -> None:
            seen.append(packet.mark)
            udp.packets.clear()
            if packet.mark:
                packet.accept()
            packet.set_mark(5)

        udp = queued_udp("loopback", mark_first, default_verdict=Verdict.REPEAT)
        udp.flow.send(b"1")
        run_until(udp.queue, lambda: len(seen) == 2)
        assert seen == [0, 5]
        assert udp.flow.receive() == b"1"

    def test_with_the_changes_made(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp("loopback", Packet.retain, default_verdict=Verdict.ACCEPT)
        packet = udp.deliver_one(b"hello")
        packet.set_payload(packet.get_payload()[:-5] + b"HELLO", checksums=True)
        del packet
        udp.packets.clear()
        assert udp.flow.receive() == b"HELLO"

    def test_to_pulled_packets_and_to_no_others(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER, default_verdict=Verdict.ACCEPT)
        flow.send(*numbered(6))
        packets = queue.read(timeout=TIMEOUT)
        assert len(packets) == 6
        packets[1].drop()
        kept = packets[3]
        packets.clear()
        # They wait for the one that is kept as any verdict does: not for long.
        assert sorted(flow.receive_all(4)) == [b"0", b"2", b"4", b"5"]
        assert bound_queues()[queue_num].depth == 1
        kept.accept()
        assert flow.receive() == b"3"

    def test_to_packets_in_a_reference_cycle(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        udp = queued_udp(default_verdict=Verdict.ACCEPT)
        cycle: list[Any] = [udp.deliver_one(b"1")]
        cycle.append(cycle)
        udp.packets.clear()
        del cycle
        gc.collect()
        assert udp.flow.receive() == b"1"

    def test_on_another_thread(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp(default_verdict=Verdict.ACCEPT)
        packets = udp.deliver(*numbered(10))
        udp.packets.clear()
        in_thread(packets.clear).result(TIMEOUT)
        assert sorted(udp.flow.receive_all(10)) == numbered(10)

    def test_to_a_packet_whose_verdict_could_not_be_sent(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp(default_verdict=Verdict.ACCEPT)
        packet = udp.deliver_one(b"1")
        udp.packets.clear()
        with without_net_admin():
            packet.drop()
        with pytest.raises(PermissionError):
            udp.queue.run(block=False)
        del packet
        assert udp.flow.receive() == b"1"

    def test_errors_of_sending_go_to_the_hook(
        self, queued_udp: Callable[..., QueuedUdp], unraisable: list[Any]
    ) -> None:
        udp = queued_udp(default_verdict=Verdict.ACCEPT)
        packet = udp.deliver_one(b"1")
        udp.packets.clear()
        with open(os.devnull) as other:
            duplicate = os.dup(udp.queue.fileno())
            os.dup2(other.fileno(), udp.queue.fileno())
            try:
                del packet
            finally:
                os.dup2(duplicate, udp.queue.fileno(), inheritable=False)
                os.close(duplicate)
        assert [type(error) for error in unraisable] == [OSError]
        assert "verdicts could not be sent" in str(unraisable[0])

    def test_error_of_an_earlier_verdict_still_comes_from_the_next_call(
        self, wire: Wire, queued_udp: Callable[..., QueuedUdp], unraisable: list[Any]
    ) -> None:
        udp = queued_udp(default_verdict=Verdict.ACCEPT, verdict_delay=0.001)
        first, second, third = udp.deliver(*numbered(3))
        udp.packets.clear()
        duplicate = os.dup(udp.queue.fileno())
        os.dup2(wire.fd, udp.queue.fileno())
        wire.cut()
        first.accept()
        wait_until(lambda: first.verdict is None, what="the helper's send has failed")
        os.dup2(duplicate, udp.queue.fileno(), inheritable=False)
        os.close(duplicate)
        del second
        with pytest.raises(OSError, match="verdicts could not be sent"):
            third.accept()
        assert not unraisable
        assert udp.flow.receive() == b"1"


class TestNotGiven:
    def test_after_unbind(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp(default_verdict=Verdict.ACCEPT)
        udp.deliver(b"1", b"2")
        udp.queue.unbind()
        with warnings_told() as told:
            udp.packets.clear()
        assert not told
        assert not udp.flow.arrived()
        assert udp.queue.stats().abandoned == 0

    def test_in_a_forked_child_to_packets_of_its_parent(
        self, queue_num: int, queued: Callable[..., UdpFlow], run_program: Callable[..., Program]
    ) -> None:
        flow = queued()
        program = run_program(
            """
            import gc, os, sys
            from netfilterqueue import NetfilterQueue, Verdict
            queue = NetfilterQueue()
            queue.bind(int(sys.argv[1]), sock_len=65536, default_verdict=Verdict.ACCEPT)
            print("bound")
            (parents,) = queue.read()
            if not (child := os.fork()):
                del parents
                print("forked")
                (childs,) = queue.read()
                del childs
                assert queue.stats().abandoned == 1
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            print("child has ended")
            parents.drop()
            queue.close()
            """,
            str(queue_num),
        )
        program.wait_for("bound")
        flow.send(b"parent's")
        program.wait_for("forked")
        flow.send(b"child's")
        program.run()
        assert flow.receive() == b"child's"
        assert not flow.arrived()

    def test_by_the_end_of_the_interpreter(
        self, queue_num: int, queued: Callable[..., UdpFlow], run_program: Callable[..., Program]
    ) -> None:
        flow = queued()
        program = run_program(
            """
            import sys
            from netfilterqueue import NetfilterQueue, Verdict
            queue = NetfilterQueue()
            queue.bind(int(sys.argv[1]), sock_len=65536, default_verdict=Verdict.ACCEPT)
            print("bound")
            packets = queue.read()
            """,
            str(queue_num),
        )
        program.wait_for("bound")
        flow.send(b"1")
        assert program.run() == "bound\n"
        assert not flow.arrived()


class TestWarning:
    def test_says_what_to_do_at_the_callers_line(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        udp = queued_udp()
        packet = udp.deliver_one()
        udp.packets.clear()
        with warnings_told() as told:
            del packet
        assert [one.category for one in told] == [ResourceWarning]
        assert str(told[0].message).startswith(ABANDONED)
        assert "bind with default_verdict" in str(told[0].message)
        assert told[0].filename == __file__
        found = udp.queue.stats()
        assert found.abandoned == 1
        assert found.verdicts == dict.fromkeys(found.verdicts, 0)
        assert bound_queues()[queue_num].depth == 1

    def test_only_for_packets_that_are_undecided(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp(callback=Packet.accept)
        with warnings_told() as told:
            udp.deliver(*numbered(40))
            udp.packets.clear()
        assert not told
        assert udp.queue.stats().abandoned == 0

    def test_made_an_error_it_goes_to_the_hook(
        self, queued_udp: Callable[..., QueuedUdp], unraisable: list[Any]
    ) -> None:
        udp = queued_udp()
        packets = udp.deliver(*numbered(3))
        udp.packets.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            packets.clear()
        assert [type(error) for error in unraisable] == [ResourceWarning] * 3
        # The others of a read still do not wait for it.
        assert udp.flow.arrived() == []
        udp.deliver_one(b"next").accept()
        assert udp.flow.receive() == b"next"

    def test_many_leave_nothing_behind(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp(max_len=10000)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("default")
            for _ in range(20):
                udp.deliver(*numbered(10))
                udp.packets.clear()
        registry = globals().get("__warningregistry__", {})
        assert sum(ABANDONED in str(key) for key in registry) <= 1


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (Verdict.STOLEN, ValueError, "STOLEN: 2>, but must be Verdict.DROP, ACCEPT, REPEAT or"),
        (Verdict.QUEUE, ValueError, "QUEUE: 3>, but must be Verdict.DROP, ACCEPT, REPEAT or STOP"),
        (6, ValueError, "default_verdict is 6, but must be Verdict.DROP, ACCEPT"),
        (-1, ValueError, "default_verdict is -1, but must be Verdict.DROP, ACCEPT"),
        ("accept", TypeError, "default_verdict is 'accept', but must be Verdict.DROP"),
    ],
)
def test_wrong_argument_is_refused_before_anything_is_sent(
    queue: NetfilterQueue, queue_num: int, value: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER, default_verdict=value)
    assert not bound_queues()

"""fork() at every moment: the child starts with nothing pending, the parent goes on as before."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict
from support import (
    RECEIVE_BUFFER,
    TIMEOUT,
    bound_queues,
    in_thread,
    run_until,
    wait_until,
    wait_until_blocked,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Program, QueuedUdp, UdpFlow

HELPER = "nfqueue-verdict"
FOREVER = 3600  # seconds: what waits so long waits for the parent's other verdicts


class Child:
    """A forked copy of this process that calls a function and ends."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)

    def wait(self) -> None:
        """Wait for its end, which must be a success."""
        try:
            wait_until(self.has_ended)
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise
        assert self.status == 0

    def has_ended(self) -> bool:
        pid, self.status = os.waitpid(self.pid, os.WNOHANG)
        return pid == self.pid


def in_child(function: Callable[[], object]) -> None:
    """Fork, call a function in the child, and wait for the child's end, which must be a success."""
    Child(function).wait()


def has_helper() -> bool:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            if (task / "comm").read_text(encoding="ascii").strip() == HELPER:
                return True
    return False


def expect_it_works(udp: QueuedUdp) -> None:
    """What matters after each fork: packets come, one by one and several, and go on."""
    for payloads in [(b"after",), (b"after 1", b"after 2", b"after 3")]:
        for packet in udp.deliver(*payloads):
            if packet.verdict is None:
                packet.accept()
        assert udp.flow.receive_all(len(payloads)) == list(payloads)


class TestParentGoesOn:
    """Whatever the child does with its copy of the queue."""

    @pytest.mark.parametrize(
        "use",
        [
            lambda queue: None,
            lambda queue: queue.close(),
            lambda queue: queue.__exit__(None, None, None),
            lambda queue: queue.stop(),
            lambda queue: queue.fileno(),
        ],
        ids=["end at once", "close", "with", "stop", "fileno"],
    )
    def test_idle_queue(
        self, queued_udp: Callable[..., QueuedUdp], use: Callable[[NetfilterQueue], object]
    ) -> None:
        udp = queued_udp()
        in_child(lambda: use(udp.queue))
        expect_it_works(udp)

    @pytest.mark.parametrize("ending", ["sys.exit()", "os._exit(0)", "del queue", "queue = None"])
    def test_child_of_a_program_ends(
        self,
        run_program: Callable[..., Program],
        queued: Callable[..., UdpFlow],
        queue_num: int,
        ending: str,
    ) -> None:
        """An interpreter's exit, too, closes what is open, which is the child's copy here."""
        flow = queued()
        program = run_program(
            f"""
            import gc, os, sys
            from netfilterqueue import NetfilterQueue, Packet
            queue = NetfilterQueue()
            queue.bind(int(sys.argv[1]), Packet.accept, sock_len=65536)
            pid = os.fork()
            if pid == 0:
                {ending}
                gc.collect()
                sys.exit()
            assert os.waitpid(pid, 0)[1] == 0
            print("child has ended")
            queue.run()
            """,
            str(queue_num),
        )
        program.wait_for("child has ended")
        flow.send(b"hello")
        assert flow.receive() == b"hello"

    def test_queue_is_collected_in_the_child(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        owners = [NetfilterQueue()]
        packets: list[Packet] = []
        owners[0].bind(queue_num, packets.append, sock_len=RECEIVE_BUFFER)
        port_id = bound_queues()[queue_num].port_id

        def collect() -> None:
            descriptor = owners[0].fileno()
            owners.clear()
            gc.collect()
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)

        in_child(collect)
        assert bound_queues()[queue_num].port_id == port_id
        flow.send(b"hello")
        run_until(owners[0], lambda: packets)
        packets[0].accept()
        assert flow.receive() == b"hello"

    def test_packet_with_its_queue_is_collected_in_the_child(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp()
        udp.deliver(b"1", b"2")

        def collect() -> None:
            udp.packets.clear()
            gc.collect()

        in_child(collect)
        for packet in udp.packets:
            packet.accept()
        assert udp.flow.receive_all(2) == [b"1", b"2"]

    def test_child_of_a_child(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp()
        in_child(lambda: in_child(udp.queue.close))
        expect_it_works(udp)

    def test_explicit_unbind_in_the_child_unbinds(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp()
        in_child(udp.queue.unbind)
        assert not bound_queues()
        udp.queue.unbind()  # the parent may find out by itself

    def test_child_binds_its_own_queue(self, queue: NetfilterQueue, queue_num: int) -> None:
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)

        def bind_another() -> None:
            with NetfilterQueue() as own:
                own.bind(queue_num + 1, print, sock_len=RECEIVE_BUFFER)
                assert sorted(bound_queues()) == [queue_num, queue_num + 1]
            assert sorted(bound_queues()) == [queue_num]

        in_child(bind_another)
        assert sorted(bound_queues()) == [queue_num]

    def test_child_that_binds_the_inherited_object_unbinds_it_by_closing(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        def bind_and_close() -> None:
            queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
            assert bound_queues()
            queue.close()

        in_child(bind_and_close)
        assert not bound_queues()


class TestMoments:
    """Where the fork finds the queue: in a callback, verdicts pending, the helper at work."""

    def test_in_a_callback(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        def fork_and_accept(packet: Packet) -> None:
            in_child(lambda: None)
            packet.accept()

        udp = queued_udp(callback=fork_and_accept)
        udp.deliver(b"1", b"2", b"3")
        assert udp.flow.receive_all(3) == [b"1", b"2", b"3"]

    @pytest.mark.parametrize("verdict_delay", [0, 0.001, FOREVER])
    def test_verdicts_that_are_pending_are_the_parents(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int, verdict_delay: float
    ) -> None:
        """Sent once, before the fork: nothing would bound how long they wait after it."""
        children: list[Child] = []

        def fork_at_the_third(packet: Packet) -> None:
            if len(udp.packets) == 3:
                children.append(Child(udp.queue.close))
                children[0].wait()
                assert udp.flow.receive_all(2) == [b"1", b"2"]
            packet.accept()

        udp = queued_udp(callback=fork_at_the_third, verdict_delay=verdict_delay)
        udp.flow.send(b"1", b"2", b"3", b"4")
        wait_until_queued(queue_num, 4)
        udp.queue.run(block=False)
        assert len(children) == 1
        assert udp.flow.receive_all(2) == [b"3", b"4"]
        assert [packet.verdict for packet in udp.packets] == [Verdict.ACCEPT] * 4
        expect_it_works(udp)

    def test_packets_read_but_not_delivered_are_the_parents(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        def fork_at_the_first(packet: Packet) -> None:
            if len(udp.packets) == 1:
                # The child returns into the loop and finds nothing that is left to deliver.
                if os.fork() == 0:
                    return
                os.wait()
            packet.accept()

        udp = queued_udp(callback=fork_at_the_first)
        parent = os.getpid()
        udp.flow.send(b"1", b"2", b"3")
        wait_until_queued(queue_num, 3)
        try:
            udp.queue.run(block=False)
        finally:
            if os.getpid() != parent:
                os._exit(len(udp.packets))
        assert udp.flow.receive_all(3) == [b"1", b"2", b"3"]

    def test_helper_at_work(self, queued_udp: Callable[..., QueuedUdp], queue_num: int) -> None:
        udp = queued_udp()
        for _ in range(5):
            before = len(udp.packets)
            udp.flow.send(b"1", b"2", b"3")
            wait_until_queued(queue_num, 3)
            udp.queue.run(block=False)
            first, second, third = udp.packets[before:]
            first.accept()
            assert has_helper()

            def check_in_child(second: Packet = second) -> None:
                assert not has_helper()
                second.accept()  # the child may decide, too

            in_child(check_in_child)
            assert sorted(udp.flow.receive_all(2)) == [b"1", b"2"]
            third.accept()
            assert udp.flow.receive() == b"3"
            # The parent's copy does not know: the kernel refuses it, and nothing ends.
            second.drop()
            udp.queue.run(block=False)

    def test_child_has_a_helper_of_its_own(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        udp = queued_udp()
        udp.deliver(b"1", b"2")
        for packet in udp.packets:
            packet.accept()
        udp.flow.receive_all(2)

        def handle_some() -> None:
            before = len(udp.packets)
            udp.flow.send(b"3", b"4")
            wait_until_queued(queue_num, 2)
            udp.queue.run(block=False)
            udp.packets[before].accept()  # the second stays undecided: the helper sends
            assert has_helper()
            assert udp.flow.receive() == b"3"
            udp.packets[before + 1].accept()
            assert udp.flow.receive() == b"4"

        in_child(handle_some)
        expect_it_works(udp)

    def test_while_another_thread_runs_the_queue(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp(callback=Packet.accept)
        running = in_thread(udp.queue.run)
        wait_until_blocked(udp.queue.fileno())
        with warnings.catch_warnings():
            # Since 3.12, Python says that forking with threads is the user's own risk.
            warnings.simplefilter("ignore", DeprecationWarning)
            in_child(udp.queue.close)
            # In the child nobody reads, though the parent's thread takes the kernel's answer.
            in_child(udp.queue.unbind)
        assert not bound_queues()
        udp.queue.unbind()
        assert running.result(TIMEOUT) is None

    def test_child_is_stopped_once_whoever_ran_the_queue_in_the_parent(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        def read_again() -> None:
            queue.stop()
            assert queue.read() == []
            start = time.monotonic()
            assert queue.read(timeout=0.05) == []
            assert time.monotonic() - start >= 0.05

        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        reading = in_thread(queue.read)
        wait_until_blocked(queue.fileno())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            in_child(read_again)
        queue.stop()
        assert reading.result(TIMEOUT) == []

    def test_while_other_threads_decide(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        """A lock that another thread holds at that moment is no use in the child."""
        udp = queued_udp(callback=Packet.accept)

        def deliver() -> None:
            for _ in range(10):
                udp.flow.send(*[b"busy"] * 20)
                udp.flow.receive_all(20)

        def use_and_close() -> None:
            with contextlib.suppress(RuntimeError):
                udp.packets[-1].accept()
            udp.queue.close()

        running = in_thread(udp.queue.run)
        delivering = in_thread(deliver)
        wait_until(lambda: udp.packets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            while not delivering.done():
                in_child(use_and_close)
        delivering.result()
        udp.queue.stop()
        assert running.result(TIMEOUT) is None

    def test_no_warning_about_threads(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        """Since Python 3.12 a fork warns when there is a second thread; a helper ends before."""
        udp = queued_udp()
        for _ in range(30):
            before = len(udp.packets)
            udp.flow.send(b"1", b"2")
            wait_until_queued(queue_num, 2)
            udp.queue.run(block=False)
            udp.packets[before].accept()
            assert has_helper()
            in_child(lambda: None)
            wait_until(lambda: not has_helper())
            udp.packets[before + 1].accept()
            udp.flow.receive_all(2)


class TestSubprocesses:
    def test_command_in_a_callback(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        outputs: list[bytes] = []

        def run_command(packet: Packet) -> None:
            outputs.append(subprocess.run(["echo", "hi"], capture_output=True, check=True).stdout)
            packet.accept()

        udp = queued_udp(callback=run_command)
        udp.deliver(b"1", b"2", b"3")
        assert udp.flow.receive_all(3) == [b"1", b"2", b"3"]
        assert outputs == [b"hi\n"] * 3

    def test_command_with_a_preexec_function(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp()
        udp.deliver(b"1", b"2")
        subprocess.run(["true"], check=True, preexec_fn=lambda: None)
        for packet in udp.packets:
            packet.accept()
        assert udp.flow.receive_all(2) == [b"1", b"2"]

    def test_command_does_not_inherit_the_socket(
        self, queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        listing = subprocess.run(
            ["ls", "-l", "/proc/self/fd"],
            capture_output=True,
            check=True,
            text=True,
            close_fds=False,
        )
        inode = os.readlink(f"/proc/self/fd/{queue.fileno()}")
        assert inode.startswith("socket:")
        assert inode not in listing.stdout

    def test_queue_that_was_bound_before_runs_in_a_process_of_multiprocessing(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp(callback=Packet.accept)
        process = multiprocessing.get_context("fork").Process(target=udp.queue.run)
        process.start()
        try:
            for payloads in [(b"1",), (b"2", b"3", b"4")]:
                udp.flow.send(*payloads)
                assert udp.flow.receive_all(len(payloads)) == list(payloads)
        finally:
            process.terminate()
            process.join(TIMEOUT)
        # The parent has it still, and goes on where the child has ended.
        assert udp.packets == []
        expect_it_works(udp)

    def test_parent_unbinds_while_a_process_of_multiprocessing_runs(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        """The other process, which reads the same socket, may take the kernel's answer."""
        udp = queued_udp(callback=Packet.accept)
        process = multiprocessing.get_context("fork").Process(target=udp.queue.run)
        process.start()
        try:
            udp.flow.send(b"1")
            assert udp.flow.receive() == b"1"
            wait_until_blocked(udp.queue.fileno(), pid=process.pid or 0)
            udp.queue.unbind()
            assert not bound_queues()
        finally:
            process.terminate()
            process.join(TIMEOUT)

    def test_process_of_multiprocessing_ends_by_stop(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        def accept_and_stop(packet: Packet) -> None:
            packet.accept()
            udp.queue.stop()

        udp = queued_udp(callback=accept_and_stop)
        process = multiprocessing.get_context("fork").Process(target=udp.queue.run)
        process.start()
        udp.flow.send(b"1")
        process.join(TIMEOUT)
        assert process.exitcode == 0
        assert udp.flow.receive() == b"1"
        assert bound_queues()


def test_verdict_of_the_child_counts_where_the_parent_gave_none(
    queued_udp: Callable[..., QueuedUdp],
) -> None:
    udp = queued_udp(callback=Packet.retain)
    packet = udp.deliver_one(b"hello")

    def decide() -> None:
        assert packet.get_payload().endswith(b"hello")
        packet.set_mark(7)
        packet.accept()

    in_child(decide)
    assert udp.flow.receive() == b"hello"
    assert packet.verdict is None

"""Nothing leaks: objects, memory, descriptors, threads. Each public name has a test here, or fails.

What a debug build counts by itself, the fixture of all tests compares.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import sys
import sysconfig
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from netfilterqueue._channel import alive
from netfilterqueue._handmade import packets_from

from memory import assert_no_growth, public_names, suppressing
from messages import simple_packets
from netfilterqueue import COPY_META, NetfilterQueue, Packet, Verdict
from netfilterqueue.conntrack import Conntrack
from netfilterqueue.stats import kernel_queues
from netfilterqueue.testing import packet as packet_by_hand
from support import RECEIVE_BUFFER, bound_queues, run_until, wait_until_queued

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support import Program, QueuedUdp, UdpFlow


def use_views(packet: Packet) -> None:
    whole = memoryview(packet)
    part = whole[4:8]
    del whole
    assert bytes(part)
    packet.set_payload(b"x" * 40)
    assert bytes(memoryview(packet)) == b"x" * 40
    packet.set_payload(None)


def use_set_payload(packet: Packet) -> None:
    for payload in (bytearray(600), memoryview(bytes(700)), bytes(800), None):
        packet.set_payload(payload)
    for wrong in (b"", bytes(65532)):
        suppressing(ValueError, packet.set_payload, wrong)
    suppressing(TypeError, packet.set_payload, "text")
    assert packet.set_payload(bytearray(bytes(packet)), checksums=True)
    suppressing(ValueError, packet.set_payload, bytes(40), checksums=True)
    packet.set_payload(bytes(900))
    packet.drop()
    suppressing(RuntimeError, packet.drop)


def use_set_mark(packet: Packet) -> None:
    packet.set_mark(0xFFFFFFF0)
    suppressing(OverflowError, packet.set_mark, -1)
    suppressing(TypeError, packet.set_mark, "1")
    packet.accept()


def use_repeat(packet: Packet) -> None:
    # It comes back with the mark, and is not repeated once more.
    if packet.mark == 0:
        packet.set_mark(1)
        packet.repeat()


def use_requeue(packet: Packet) -> None:
    suppressing(ValueError, packet.requeue, -1)
    # Nobody listens there.
    packet.requeue(65535)
    suppressing(RuntimeError, packet.requeue, 65535)


def use_changes(packet: Packet) -> None:
    for priority in (1, 2):
        packet.set_priority(priority)
    suppressing(ValueError, packet.set_priority, -1)
    # They are for other packets: these are not bridged, and came without their connection.
    suppressing(RuntimeError, packet.set_conntrack_mark, 1)
    suppressing(RuntimeError, packet.set_conntrack_labels, b"1")
    suppressing(RuntimeError, packet.set_vlan, 0x8100, 1)
    suppressing(RuntimeError, packet.set_l2_header, bytes(14))


def use_retain(packet: Packet) -> None:
    packet.retain()
    packet.retain()
    packet.get_payload()


def use_verdict(packet: Packet) -> None:
    assert packet.verdict is None
    packet.drop()
    assert packet.verdict == Verdict.DROP


# What is done with each packet, for each public name. Afterwards it is dropped, where undecided.
PACKET_USES: dict[str, Callable[[Packet], object]] = {
    "__bool__": bool,
    "__buffer__": use_views,
    "__bytes__": bytes,
    "__init__": lambda packet: suppressing(TypeError, Packet),
    "__len__": len,
    "__str__": str,
    "accept": Packet.accept,
    "cgroup_classid": lambda packet: packet.cgroup_classid,
    "checksum_ready": lambda packet: packet.checksum_ready,
    "checksum_verified": lambda packet: packet.checksum_verified,
    "conntrack": lambda packet: packet.conntrack,
    "drop": Packet.drop,
    "get_hw": Packet.get_hw,
    "get_mark": Packet.get_mark,
    "get_payload": Packet.get_payload,
    "get_payload_len": Packet.get_payload_len,
    "get_timestamp": Packet.get_timestamp,
    "gid": lambda packet: packet.gid,
    "gso": lambda packet: packet.gso,
    "hook": lambda packet: packet.hook,
    "hw_protocol": lambda packet: packet.hw_protocol,
    "id": lambda packet: packet.id,
    "indev": lambda packet: packet.indev,
    "indev_name": lambda packet: packet.indev_name,
    "l2_header": lambda packet: packet.l2_header,
    "mark": lambda packet: packet.mark,
    "original_len": lambda packet: packet.original_len,
    "outdev": lambda packet: packet.outdev,
    "outdev_name": lambda packet: packet.outdev_name,
    "physindev": lambda packet: packet.physindev,
    "physindev_name": lambda packet: packet.physindev_name,
    "physoutdev": lambda packet: packet.physoutdev,
    "physoutdev_name": lambda packet: packet.physoutdev_name,
    "priority": lambda packet: packet.priority,
    "queue_num": lambda packet: packet.queue_num,
    "repeat": use_repeat,
    "requeue": use_requeue,
    "retain": use_retain,
    "secctx": lambda packet: packet.secctx,
    "set_conntrack_labels": use_changes,
    "set_conntrack_mark": use_changes,
    "set_l2_header": use_changes,
    "set_mark": use_set_mark,
    "set_payload": use_set_payload,
    "set_priority": use_changes,
    "set_vlan": use_changes,
    "stop": Packet.stop,
    "truncated": lambda packet: packet.truncated,
    "uid": lambda packet: packet.uid,
    "verdict": use_verdict,
    "vlan": lambda packet: packet.vlan,
}


class QueueUse:
    """What is done with a queue that is bound and has traffic, for each public name."""

    def __init__(self, flow: UdpFlow, queue_num: int) -> None:
        self.flow = flow
        self.queue_num = queue_num

    @contextlib.contextmanager
    def bound(self, callback: Any = Packet.drop, **options: Any) -> Iterator[NetfilterQueue]:
        with NetfilterQueue() as queue:
            queue.bind(self.queue_num, callback, sock_len=RECEIVE_BUFFER, **options)
            yield queue

    def use_bind(self) -> None:
        with self.bound(batch=4) as queue:
            suppressing(RuntimeError, queue.bind, self.queue_num, print)
            suppressing(ValueError, queue.bind, -1, print)
            with NetfilterQueue() as second:
                suppressing(OSError, second.bind, self.queue_num, print)

    def use_unbind(self) -> None:
        with self.bound() as queue:
            self.flow.send(b"left in the queue")
            queue.unbind()
            queue.unbind()

    def use_close(self) -> None:
        queue = NetfilterQueue()
        queue.bind(self.queue_num, print, sock_len=RECEIVE_BUFFER)
        queue.close()
        queue.close()
        suppressing(ValueError, queue.fileno)

    def use_run(self) -> None:
        with self.bound() as queue:
            self.flow.send(b"1", b"2", b"3")
            queue.run(block=False)
        with self.bound(lambda packet: 1 / 0) as queue:
            self.flow.send(b"1", b"2", b"3")
            suppressing(ZeroDivisionError, queue.run, False)
            suppressing(ZeroDivisionError, queue.run, False)
            queue.unbind()
            suppressing(RuntimeError, queue.run)

    def use_run_socket(self) -> None:
        with self.bound() as queue, socket.socket(fileno=os.dup(queue.fileno())) as same_socket:
            same_socket.setblocking(False)
            self.flow.send(b"1", b"2", b"3")
            queue.run_socket(same_socket)

    def use_stop(self) -> None:
        with NetfilterQueue() as queue:

            def stop(packet: Packet) -> None:
                queue.stop()

            queue.bind(self.queue_num, stop, sock_len=RECEIVE_BUFFER)
            self.flow.send(b"1", b"2", b"3")
            queue.run()
            queue.stop()
            queue.run()

    def use_handle(self) -> None:
        class Own(NetfilterQueue):
            def handle(self, packet: Packet) -> Verdict:
                return Verdict.DROP

        with Own() as queue:
            queue.bind(self.queue_num, sock_len=RECEIVE_BUFFER)
            self.flow.send(b"1", b"2", b"3")
            queue.run(block=False)

    def use_enter(self) -> None:
        with NetfilterQueue() as queue:
            assert queue.fileno() == queue.get_fd()

    def use_init(self) -> None:
        suppressing(RuntimeError, NetfilterQueue().__init__)  # type: ignore[misc]
        suppressing(OSError, NetfilterQueue, sockfd=0)
        NetfilterQueue(netns=os.getpid())
        suppressing(ValueError, NetfilterQueue, netns=os.devnull)

    def use_exit(self) -> None:
        with contextlib.suppress(ZeroDivisionError), self.bound():
            1 / 0  # noqa: B018 - it raises

    def use_read(self) -> None:
        with NetfilterQueue() as queue:
            queue.bind(self.queue_num, sock_len=RECEIVE_BUFFER)
            self.flow.send(b"1", b"2", b"3")
            kept = queue.read(count=2, timeout=0)
            kept += queue.read(timeout=0)
            for packet in kept:
                packet.accept()

    def use_iteration(self) -> None:
        with NetfilterQueue() as queue:
            queue.bind(self.queue_num, sock_len=RECEIVE_BUFFER)
            self.flow.send(b"1", b"2", b"3")
            for packet in queue:
                packet.accept()
                queue.stop()

    def use_coroutines(self) -> None:
        async def pull(queue: NetfilterQueue) -> None:
            kept = await queue.aread(count=1)
            async for packet in queue:
                kept[0].accept()
                packet.accept()
                queue.stop()

        with NetfilterQueue() as queue:
            queue.bind(self.queue_num, sock_len=RECEIVE_BUFFER)
            self.flow.send(b"1", b"2", b"3")
            asyncio.run(pull(queue))

    def use_stats(self) -> None:
        with self.bound() as queue:
            self.flow.send(b"1", b"2", b"3")
            queue.run(block=False)
            assert queue.stats().kernel
            assert kernel_queues(os.getpid())

    def use_set_mode(self) -> None:
        with self.bound() as queue:
            self.flow.send(b"1", b"2", b"3")
            queue.set_mode(COPY_META, 0)
            suppressing(ValueError, queue.set_mode, 3, 0)
            queue.run(block=False)

    def use_set_max_len(self) -> None:
        with self.bound() as queue:
            self.flow.send(b"1", b"2", b"3")
            queue.set_max_len(2)
            suppressing(ValueError, queue.set_max_len, 0)

    def use_set_flags(self) -> None:
        with self.bound() as queue:
            self.flow.send(b"1", b"2", b"3")
            queue.set_flags(uid_gid=True, gso=False)
            suppressing(OSError, queue.set_flags, conntrack=True, secctx=True)
            queue.run(block=False)
            queue.unbind()
            suppressing(RuntimeError, queue.set_flags)

    def use_constants(self) -> None:
        assert NetfilterQueue.COPY_META == COPY_META


QUEUE_USES: dict[str, Callable[[QueueUse], object]] = {
    "COPY_META": QueueUse.use_constants,
    "COPY_NONE": QueueUse.use_constants,
    "COPY_PACKET": QueueUse.use_constants,
    "__aiter__": QueueUse.use_coroutines,
    "__del__": QueueUse.use_init,
    "__enter__": QueueUse.use_enter,
    "__exit__": QueueUse.use_exit,
    "__init__": QueueUse.use_init,
    "__iter__": QueueUse.use_iteration,
    "aread": QueueUse.use_coroutines,
    "bind": QueueUse.use_bind,
    "close": QueueUse.use_close,
    "fileno": QueueUse.use_enter,
    "get_fd": QueueUse.use_enter,
    "handle": QueueUse.use_handle,
    "read": QueueUse.use_read,
    "run": QueueUse.use_run,
    "run_socket": QueueUse.use_run_socket,
    "set_flags": QueueUse.use_set_flags,
    "set_max_len": QueueUse.use_set_max_len,
    "set_mode": QueueUse.use_set_mode,
    "stats": QueueUse.use_stats,
    "stop": QueueUse.use_stop,
    "unbind": QueueUse.use_unbind,
}


class TestNothingLeaks:
    @pytest.mark.parametrize(
        ("kind", "uses"), [(Packet, PACKET_USES), (NetfilterQueue, QUEUE_USES)]
    )
    def test_every_public_name_has_a_leak_test(self, kind: type, uses: dict[str, Any]) -> None:
        assert public_names(kind) <= set(uses)
        # Before Python 3.12, there is no name for the buffer of an object.
        assert set(uses) - {"__buffer__"} <= public_names(kind)

    @pytest.mark.parametrize("name", PACKET_USES)
    def test_packet(self, queued_udp: Callable[..., QueuedUdp], name: str) -> None:
        def use(packet: Packet) -> None:
            udp.packets.clear()
            PACKET_USES[name](packet)
            if packet.verdict is None:
                packet.drop()

        udp = queued_udp(callback=use)

        def once() -> None:
            # One read of several packets, mostly: they share its memory, and a helper.
            udp.flow.send(b"payload" * 20, b"", b"payload" * 100)
            udp.queue.run(block=False)
            udp.flow.arrived()

        assert_no_growth(once)

    @pytest.mark.parametrize("name", QUEUE_USES)
    def test_queue(self, queued: Callable[..., UdpFlow], queue_num: int, name: str) -> None:
        use = QueueUse(queued(), queue_num)
        # Traffic finds no queue now and then, and is dropped.
        assert_no_growth(lambda: suppressing(PermissionError, QUEUE_USES[name], use))

    def test_packet_that_is_not_decided(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp(max_len=100000)

        def once() -> None:
            udp.deliver(b"1", b"2", b"3")
            udp.packets.clear()

        assert_no_growth(once)

    def test_packet_that_gets_the_default_verdict(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        udp = queued_udp(default_verdict=Verdict.DROP)

        def once() -> None:
            udp.deliver(b"1", b"2", b"3")
            udp.packets.clear()

        assert_no_growth(once)

    def test_packets_made_by_hand(self) -> None:
        assert_no_growth(lambda: packets_from([*simple_packets(1, 2, 3), b"no message"]))

    def test_attributes_of_packets_made_by_hand(self) -> None:
        def once() -> None:
            made = packet_by_hand(
                bytes(40),
                indev_name="eth0",
                secctx="ssh_t",
                conntrack=Conntrack(labels=bytes(16)),
                vlan=(0x8100, 1),
                l2_header=bytes(14),
            )
            assert made.secctx
            assert made.vlan
            assert made.indev_name
            for number in (1, 2):
                made.set_conntrack_mark(number)
                made.set_conntrack_labels(bytes(number))
                made.set_vlan(0x8100, number)
                made.set_l2_header(bytearray(made.l2_header or b""))
            suppressing(ValueError, made.set_conntrack_labels, bytes(17))
            suppressing(ValueError, made.set_l2_header, bytes(15))
            made.accept()

        assert_no_growth(once)

    def test_arguments_are_given_back(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        def callback(packet: Packet) -> None:
            packet.set_payload(payload)
            packet.drop()

        payload = bytes(range(100))
        udp = queued_udp()
        udp.queue.unbind()
        before = sys.getrefcount(payload), sys.getrefcount(callback)
        for _ in range(3):
            udp.queue.bind(queue_num, callback, sock_len=RECEIVE_BUFFER)
            udp.flow.send(b"1", b"2")
            udp.queue.run(block=False)
            assert sys.getrefcount(payload) == before[0]
            udp.queue.unbind()
        # An unbound queue may hold its last callback.
        assert sys.getrefcount(callback) <= before[1] + 1

    def test_payload_object_is_its_own_exporter(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        """An array that was given can be changed and resized afterwards: it was copied."""
        udp = queued_udp(callback=Packet.retain)
        packet = udp.deliver_one()
        payload = bytearray(b"x" * 40)
        packet.set_payload(payload)
        payload.clear()
        assert packet.get_payload() == b"x" * 40
        packet.drop()


class Owner:
    """A user's object: the queue calls its method, and it keeps the queue and packets."""

    def __init__(self) -> None:
        self.queue = NetfilterQueue()
        self.packets: list[Packet] = []

    def callback(self, packet: Packet) -> None:
        packet.retain()
        self.packets.append(packet)


class TestCollection:
    """Reference cycles are collected, and what is collected is unbound."""

    def bind(self, queued: Callable[..., UdpFlow], queue_num: int) -> Owner:
        flow = queued()
        owner = Owner()
        owner.queue.bind(queue_num, owner.callback, sock_len=RECEIVE_BUFFER)
        flow.send(b"1", b"2")
        run_until(owner.queue, lambda: len(owner.packets) == 2)
        return owner

    def test_queue_without_cycle(self, queue_num: int) -> None:
        queue = NetfilterQueue()
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        gc.disable()
        try:
            del queue
            assert not bound_queues()
        finally:
            gc.enable()

    def test_cycle_of_queue_method_and_packets(
        self, queued: Callable[..., UdpFlow], queue_num: int
    ) -> None:
        owner = self.bind(queued, queue_num)
        gone = weakref.ref(owner), weakref.ref(owner.queue)
        descriptor = owner.queue.fileno()
        del owner
        gc.collect()
        assert [reference() for reference in gone] == [None, None]
        assert not bound_queues()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)

    def test_cycle_through_a_subclass(self, queued: Callable[..., UdpFlow], queue_num: int) -> None:
        class Own(NetfilterQueue):
            def handle(self, packet: Packet) -> None:
                self.cycle = [packet, self]
                self.stop()

        flow = queued()
        queue = Own()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        flow.send(b"1")
        queue.run()
        gone = weakref.ref(queue)
        del queue
        gc.collect()
        assert gone() is None
        assert not bound_queues()

    def test_kept_packet_keeps_its_queue(
        self, queued: Callable[..., UdpFlow], queue_num: int
    ) -> None:
        owner = self.bind(queued, queue_num)
        packets = owner.packets
        owner.packets = []
        del owner
        gc.collect()
        assert list(bound_queues()) == [queue_num]
        packets.pop().drop()
        assert list(bound_queues()) == [queue_num]
        packets.pop().drop()
        gc.collect()
        assert not bound_queues()

    def test_packets_not_delivered_do_not_keep_the_queue(
        self, queued: Callable[..., UdpFlow], queue_num: int
    ) -> None:
        class Own(NetfilterQueue):
            def handle(self, packet: Packet) -> None:
                self.stop()

        flow = queued()
        queue = Own()
        queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
        flow.send(b"1", b"2", b"3")
        wait_until_queued(queue_num, 3)
        queue.run()
        gone = weakref.ref(queue)
        del queue
        gc.collect()
        assert gone() is None
        assert not bound_queues()

    def test_error_with_its_traceback(self, queued: Callable[..., UdpFlow], queue_num: int) -> None:
        def fail(packet: Packet) -> None:
            raise ZeroDivisionError

        flow = queued()
        queue = NetfilterQueue()
        queue.bind(queue_num, fail, sock_len=RECEIVE_BUFFER)
        flow.send(b"1", b"2")
        wait_until_queued(queue_num, 2)
        gone = weakref.ref(queue)
        with pytest.raises(ZeroDivisionError) as caught:
            queue.run()
        del queue, caught
        gc.collect()
        assert gone() is None
        assert not bound_queues()

    def test_view_outlives_packet_and_queue(
        self, queued: Callable[..., UdpFlow], queue_num: int
    ) -> None:
        views: list[memoryview] = []
        flow = queued()
        with NetfilterQueue() as queue:
            queue.bind(
                queue_num, lambda packet: views.append(memoryview(packet)), sock_len=RECEIVE_BUFFER
            )
            flow.send(b"1", b"2")
            run_until(queue, lambda: len(views) == 2)
        del queue
        gc.collect()
        assert [bytes(view)[-1:] for view in views] == [b"1", b"2"]
        if alive() is not None:
            assert alive()["slabs"] > 0
        views.clear()
        assert not (alive() or {}).get("slabs")


class TestHeldPackets:
    """What it costs to keep many packets."""

    COUNT = 20000
    # Bytes for each, besides its payload. Without a GIL all objects are longer by 16.
    OVERHEAD = 464 if sysconfig.get_config_var("Py_GIL_DISABLED") else 400

    # A process of its own, whose size shows what it keeps: nothing has been freed before.
    PROGRAM = """
    import gc, os, socket, sys
    from pathlib import Path
    from netfilterqueue import NetfilterQueue

    queue_num, port, count, retain = map(int, sys.argv[1:])
    payload = bytes(500)
    packets = []

    def keep(packet):
        if retain:
            packet.retain()
        packets.append(packet)

    def resident():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    queue = NetfilterQueue()
    queue.bind(queue_num, keep, max_len=count + 100, sock_len=200000)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect(("127.0.0.1", port))

    def deliver_until(number):
        while len(packets) < number:
            for _ in range(50):
                sender.send(payload)
            queue.run(block=False)

    deliver_until(100)
    before = resident()
    deliver_until(count)
    print((resident() - before) // (count - 100))
    if retain:
        assert {packet.get_payload()[28:] for packet in packets} == {payload}
    sender.close()
    """

    @pytest.mark.parametrize(("retain", "size"), [(1, 528), (0, 0)], ids=["retained", "not"])
    def test_packet_costs_little_more_than_its_payload(
        self,
        run_program: Callable[..., Program],
        queued: Callable[..., UdpFlow],
        queue_num: int,
        retain: int,
        size: int,
    ) -> None:
        arguments = [queue_num, queued().port, self.COUNT, retain]
        cost = int(run_program(self.PROGRAM, *map(str, arguments)).run(30))
        assert size < cost < size + self.OVERHEAD

    def test_slabs_are_not_held_by_packets(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        if alive() is None:
            pytest.skip("needs a debug build (NETFILTERQUEUE_DEBUG=1)")
        udp = queued_udp(callback=Packet.retain)
        for _ in range(20):
            udp.deliver(b"1", b"2", b"3")
        assert alive()["packets"] == 60
        assert alive()["slabs"] <= 2

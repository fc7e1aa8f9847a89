"""`stats()` and `kernel_queues()`: what is counted, and that the kernel counts the same."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from messages import (
    NFQA,
    FakeSocket,
    attribute,
    message,
    packet_header,
    packet_message,
    unbind_request,
)
from netfilterqueue import COPY_META, NetfilterQueue, Packet, Verdict, stats
from netfilterqueue.stats import kernel_queues
from support import (
    RECEIVE_BUFFER,
    TIMEOUT,
    in_thread,
    numbered,
    run_until,
    wait_until,
    without_net_admin,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support import QueuedUdp, UdpFlow

NONE_GIVEN = dict.fromkeys(set(Verdict) - {Verdict.STOLEN}, 0)


class TestStats:
    def test_all_are_0_at_first(self, queue: NetfilterQueue) -> None:
        found = queue.stats()
        assert found.verdicts == NONE_GIVEN
        assert found.verdict_errors == {}
        assert found.kernel is None
        numbers = dataclasses.asdict(found)
        for name in ("verdicts", "verdict_errors", "kernel"):
            del numbers[name]
        assert set(numbers.values()) == {0}

    def test_cannot_be_changed(self, queue: NetfilterQueue) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            queue.stats().packets = 1  # type: ignore[misc]

    def test_packets_and_reads(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER, batch=4)
        flow.send(*numbered(10))
        queue.run(block=False)
        found = queue.stats()
        # IPv4 and UDP headers take 28 bytes.
        sizes = [28 + len(data) for data in numbered(10)]
        assert (found.packets, found.bytes, found.batches) == (10, sum(sizes), 3)
        assert found.truncated == 0
        assert found.kernel == kernel_queues()[queue_num]
        assert found.kernel.id_sequence == 10

    def test_packets_that_were_cut_short(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp(range=100)
        udp.deliver(bytes(72), bytes(73), bytes(1000))
        found = udp.queue.stats()
        assert (found.packets, found.bytes, found.truncated) == (3, 300, 2)

    def test_packets_without_a_payload(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        udp = queued_udp(mode=COPY_META)
        udp.deliver_one()
        found = udp.queue.stats()
        assert (found.packets, found.bytes, found.truncated) == (1, 0, 0)

    def test_each_verdict(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        def decide(packet: Packet) -> None:
            if packet.mark:
                packet.drop()
            elif packet.id == 1:
                packet.set_mark(1)
                packet.repeat()
            elif packet.id < 5:
                packet.accept()

        udp = queued_udp("loopback", decide)
        udp.flow.send(*numbered(8))
        run_until(udp.queue, lambda: len(udp.packets) == 9)
        found = udp.queue.stats()
        assert found.packets == 9
        assert found.verdicts == {
            **NONE_GIVEN,
            Verdict.ACCEPT: 3,
            Verdict.DROP: 1,
            Verdict.REPEAT: 1,
        }
        assert found.verdict_errors == {}
        assert found.kernel is not None
        assert found.kernel.depth == 4

    def test_they_go_on_with_the_next_binding(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        flow = queued()
        for count in (2, 4, 6):
            queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER)
            flow.send(b"1", b"2")
            queue.run(block=False)
            assert queue.stats().verdicts[Verdict.ACCEPT] == count
            queue.unbind()
            found = queue.stats()
            assert (found.packets, found.verdicts[Verdict.ACCEPT], found.batches) == (
                count,
                count,
                count // 2,
            )
            assert found.kernel is None
        queue.close()
        assert queue.stats() == found

    def test_they_never_go_back(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        """Not while another thread unbinds, either, and sends what is pending first."""
        flow = queued()
        counts = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.is_set():
                counts.append(queue.stats().verdicts[Verdict.ACCEPT])

        watching = in_thread(watch)
        for expected in range(99, 1000, 99):
            queue.bind(queue_num, sock_len=RECEIVE_BUFFER, batch=100, verdict_delay=60)
            flow.send(*numbered(100))
            *packets, _ = queue.read()
            for packet in packets:
                packet.accept()
            wait_until(lambda: counts[-1:] == [expected])  # noqa: B023
            queue.unbind()
        ended.set()
        watching.result(TIMEOUT)
        assert counts == sorted(counts)

    def test_verdicts_that_the_kernel_refuses(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        udp = queued_udp(verdict_delay=0)
        packets = udp.deliver(*numbered(5))
        with without_net_admin():
            for packet in packets[:2]:
                packet.accept()
        with pytest.raises(PermissionError):
            udp.queue.run(block=False)
        with socket.socket(fileno=os.dup(udp.queue.fileno())) as same_socket:
            same_socket.send(unbind_request(queue_num))
        for packet in packets[2:]:
            packet.accept()
        udp.queue.run(block=False)
        found = udp.queue.stats()
        assert found.verdict_errors == {errno.EPERM: 2, errno.ENODEV: 3}
        assert found.verdicts[Verdict.ACCEPT] == 5
        assert found.kernel is None

    def test_overruns(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, Packet.drop, sock_len=4096)
        flow.send(*numbered(50))
        row = kernel_queues()[queue_num]
        assert 0 < row.dropped_socket < 50
        assert queue.stats().overruns == row.dropped_socket
        queue.run(block=False)
        assert queue.stats().packets == 50 - row.dropped_socket
        queue.close()
        assert queue.stats().overruns == row.dropped_socket

    def test_what_was_skipped(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        good = packet_message(packet_header(7), attribute(NFQA.MARK, b"\0\0\0\1"))
        datagrams = [
            b"no message",
            packet_message(attribute(NFQA.MARK, b"\0\0\0\1")),
            message(bytes(4), kind=3 << 8 | 77),
            packet_message(packet_header(7), attribute(NFQA.MARK, b"\0")),
            packet_message(packet_header(7), attribute(100, b"new")),
            good,
        ]

        queue.bind(queue_num, lambda packet: None, sock_len=RECEIVE_BUFFER)
        queue.run_socket(FakeSocket(*datagrams))
        found = queue.stats()
        assert found.packets == 3
        assert found.malformed == 2
        assert found.foreign == 1
        assert found.broken_attributes == 1
        assert found.unread_attributes == 1


class TestKernelQueues:
    def test_each_field(
        self, queued: Callable[..., UdpFlow], queue: NetfilterQueue, queue_num: int
    ) -> None:
        flow = queued()
        queue.bind(queue_num, max_len=2, range=50, sock_len=RECEIVE_BUFFER)
        flow.send(*numbered(5))
        with socket.socket(fileno=os.dup(queue.fileno())) as duplicate:
            port_id, _ = duplicate.getsockname()
        assert kernel_queues() == {
            queue_num: stats.KernelQueue(
                queue_num=queue_num,
                port_id=port_id,
                depth=2,
                copy_mode=2,
                copy_range=50,
                dropped_full=3,
                dropped_socket=0,
                id_sequence=2,
            )
        }

    def test_port_id_may_have_ten_digits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table = tmp_path / "nfnetlink_queue"
        table.write_text(
            "    1  31621     0 2 65531     0     0     2034  1\n"
            "65535 4294963131 4294967295 1     0 4294967295 4294967295 4294967295  1 7\n"
        )
        monkeypatch.setattr(stats, "KERNEL_QUEUES", os.fsencode(table))
        most = 2**32 - 1
        assert list(kernel_queues().values()) == [
            stats.KernelQueue(1, 31621, 0, 2, 65531, 0, 0, 2034),
            stats.KernelQueue(65535, 4294963131, most, 1, 0, most, most, most),
        ]

    def test_none_where_the_module_is_not_loaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stats, "KERNEL_QUEUES", os.fsencode(tmp_path / "none"))
        assert kernel_queues() == {}

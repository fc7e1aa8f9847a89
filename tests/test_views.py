"""memoryview(packet): the payload without a copy, safe for as long as the view lives."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import hashlib
import io
import queue as queues
import struct
import weakref
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import NetfilterQueue, Packet, _channel
from netfilterqueue.testing import packet as packet_of
from support import (
    RECEIVE_BUFFER,
    TIMEOUT,
    QueuedUdp,
    SocketReader,
    UdpFlow,
    in_thread,
    run_until,
    wait_until_queued,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Runner

TOO_LATE = r"^Payload data is no longer available\. You must call retain\(\) "


class PyBuffer(ctypes.Structure):
    """Py_buffer of Python's C interface."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(exporter: object) -> int:
    """Where in memory the bytes of an object are."""
    buffer = PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(exporter), ctypes.byref(buffer), 0)
    address: int = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address


def slabs_alive() -> int:
    """How many pieces of memory for reads there are, as far as the build counts them."""
    alive: dict[str, int] = _channel.alive() or {"slabs": 0}
    return alive["slabs"]


READERS: dict[str, Callable[[Packet], bytes]] = {
    "bytes": bytes,
    "bytearray": lambda packet: bytes(bytearray(packet)),
    "join": lambda packet: b"".join([packet]),
    "struct": lambda packet: struct.unpack_from(f"{len(packet)}s", packet)[0],
    "slice": lambda packet: bytes(memoryview(packet)[:5]) + bytes(memoryview(packet)[5:]),
    "file": lambda packet: io.BytesIO(packet).getvalue(),
    "cast": lambda packet: bytes(memoryview(packet).cast("b")),
}


class TestView:
    def test_view_is_flat_read_only_bytes(self) -> None:
        view = memoryview(packet_of(b"payload"))
        assert (view.format, view.itemsize, view.ndim) == ("B", 1, 1)
        assert (view.shape, view.strides, view.nbytes) == ((7,), (1,), 7)
        assert view.contiguous
        assert view.readonly
        assert list(view) == list(b"payload")
        with pytest.raises(TypeError, match="read-only"):
            view[0] = 1
        assert hash(view) == hash(b"payload")

    def test_payload_cannot_be_written_in_place(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        seen: list[bytes] = []

        def callback(packet: Packet) -> None:
            with pytest.raises(TypeError, match="read-write"):
                struct.pack_into("B", packet, 0, 0)
            seen.append(packet.get_payload())

        queued_udp(callback=callback).deliver_one()
        assert seen[0][0] == 0x45

    @pytest.mark.parametrize("reader", READERS)
    def test_whatever_reads_buffers_reads_packets(
        self, queued_udp: Callable[..., QueuedUdp], reader: str
    ) -> None:
        seen: list[tuple[bytes, bytes]] = []

        def callback(packet: Packet) -> None:
            seen.append((READERS[reader](packet), packet.get_payload()))

        queued_udp(callback=callback).deliver_one(b"hello")
        ((read, payload),) = seen
        assert read == payload

    def test_views_of_a_read_are_in_the_memory_that_it_filled(
        self, queued_udp: Callable[..., QueuedUdp], queue_num: int
    ) -> None:
        addresses: list[int] = []

        def callback(packet: Packet) -> None:
            addresses.append(address_of(packet))
            assert address_of(memoryview(packet)) == address_of(packet)

        queued = queued_udp(callback=callback)
        queued.flow.send(b"one", b"two", b"three")
        wait_until_queued(queue_num, 3)
        run_until(queued.queue, lambda: len(addresses) == 3)
        # Copies of small packets would not lie as far apart as the largest ones need.
        first, second = addresses[1] - addresses[0], addresses[2] - addresses[1]
        assert first == second > 65531

    def test_views_are_in_the_object_that_a_socket_returned(
        self, queued_udp: Callable[..., QueuedUdp], queue: NetfilterQueue
    ) -> None:
        addresses: list[int] = []
        datagrams: list[bytes] = []

        def callback(packet: Packet) -> None:
            addresses.append(address_of(packet))
            datagrams.append(reader.last)

        queued = queued_udp(callback=callback)
        with contextlib.closing(SocketReader(queue)) as reader:
            queued.flow.send(b"hello")
            run_until(reader, lambda: addresses)
        assert 0 < addresses[0] - address_of(datagrams[0]) < len(datagrams[0])

    @pytest.mark.parametrize("batch", [1, 32])
    def test_views_stay_what_they_were_over_many_later_reads(
        self,
        queue: NetfilterQueue,
        queued_udp: Callable[..., QueuedUdp],
        runner: Runner,
        batch: int,
    ) -> None:
        kept: list[tuple[memoryview, bytes]] = []

        def keep(packet: Packet) -> None:
            kept.append((memoryview(packet), packet.get_payload()))
            packet.accept()

        queued = queued_udp(callback=keep, batch=batch)
        expected = 0
        for number in range(40):
            # As many as share a read or not, and of different lengths.
            data = [b"%d %d " % (number, i) * (1 + number % 7) for i in range(1 + number % 4)]
            expected += len(data)
            queued.flow.send(*data)
            run_until(runner, lambda: len(kept) == expected)  # noqa: B023 - called at once
            assert queued.flow.receive_all(len(data)) == data
        assert all(view == payload for view, payload in kept)
        queued.packets.clear()
        queue.close()
        gc.collect()
        assert all(view == payload for view, payload in kept)
        assert len({payload for _, payload in kept}) == expected

    def test_memory_is_used_again_once_the_views_are_gone(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        before = slabs_alive()
        views: collections.deque[memoryview] = collections.deque(maxlen=3)
        addresses: set[int] = set()

        def look(packet: Packet) -> None:
            views.append(memoryview(packet))
            addresses.add(address_of(packet))
            packet.accept()

        # Where the kernel stamps no packets: it begins and ends to do so at some later moment, and
        # a payload behind a time stamp has another address.
        queued = queued_udp(callback=look, chain="OUTPUT")
        for _ in range(30):
            queued.deliver_one()
        # Those of the views, and that of the read at hand.
        assert len(addresses) == 4
        assert slabs_alive() <= before + 4

    def test_many_views_at_once(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        before = slabs_alive()
        views: list[memoryview] = []
        queued = queued_udp(callback=lambda packet: views.append(memoryview(packet)), batch=1)
        data = [b"%03d" % number for number in range(300)]
        for payload in data:
            queued.deliver_one(payload)
        assert [bytes(view[28:]) for view in views] == data
        assert len({address_of(view) for view in views}) == len(data)
        views.clear()
        assert slabs_alive() <= before + 4

    def test_view_outlives_packet_and_queue(
        self, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        views: list[memoryview] = []
        queue = NetfilterQueue()
        queue.bind(
            queue_num, lambda packet: views.append(memoryview(packet)), sock_len=RECEIVE_BUFFER
        )
        gone = weakref.ref(queue)
        flow.send(b"hello")
        run_until(queue, lambda: views)
        del queue
        gc.collect()
        assert gone() is None
        assert bytes(views[0][28:]) == b"hello"

    def test_view_outlives_a_later_bind_with_another_layout_of_the_memory(
        self, queued_udp: Callable[..., QueuedUdp], queue: NetfilterQueue, queue_num: int
    ) -> None:
        views: list[memoryview] = []
        queued = queued_udp(callback=lambda packet: views.append(memoryview(packet)))
        queued.deliver_one(b"first")
        for batch in (1, 64, 2):
            queue.unbind()
            queue.bind(queue_num, Packet.accept, sock_len=RECEIVE_BUFFER, batch=batch, range=100)
            queued.flow.send(b"other")
            run_until(queue, queued.flow.arrived)
        assert bytes(views[0][28:]) == b"first"

    def test_view_of_a_part_is_as_safe(self, queued_udp: Callable[..., QueuedUdp]) -> None:
        parts: list[memoryview] = []
        queued = queued_udp(callback=lambda packet: parts.append(memoryview(packet)[28:30]))
        queued.deliver(b"12345", b"67890")
        for _ in range(10):
            queued.deliver(b"xxxxx", b"yyyyy")
        assert bytes(parts[0]) == b"12"
        assert bytes(parts[1]) == b"67"

    def test_views_may_be_used_and_released_in_other_threads(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        handed_over: queues.SimpleQueue[tuple[memoryview, bytes] | None] = queues.SimpleQueue()

        def hash_views() -> list[bytes]:
            different = []
            while item := handed_over.get():
                view, digest = item
                # It lets other threads run meanwhile.
                if hashlib.sha256(view).digest() != digest:
                    different.append(bytes(view))
                view.release()
            return different

        def hand_over(packet: Packet) -> None:
            digest = hashlib.sha256(packet).digest()
            handed_over.put((memoryview(packet), digest))
            packet.accept()

        queued = queued_udp(callback=hand_over)
        threads = [in_thread(hash_views) for _ in range(2)]
        for number in range(100):
            queued.deliver(bytes([number]) * 5000, bytes([100 + number]) * 5000)
            queued.flow.receive_all(2)
        for _ in threads:
            handed_over.put(None)
        assert [thread.result(TIMEOUT) for thread in threads] == [[], []]

    def test_view_shows_the_payload_that_there_was_when_it_was_made(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        views: list[memoryview] = []

        def callback(packet: Packet) -> None:
            views.append(memoryview(packet))
            packet.set_payload(b"new payload")
            views.append(memoryview(packet))
            packet.set_payload(b"newer payload")
            views.append(memoryview(packet))
            packet.set_payload(None)
            views.append(memoryview(packet))

        queued = queued_udp(callback=callback)
        queued.deliver_one(b"hello")
        queued.deliver_one(b"other")
        original, new, newer, again = views[:4]
        assert bytes(original[28:]) == bytes(again[28:]) == b"hello"
        assert bytes(new) == b"new payload"
        assert bytes(newer) == b"newer payload"

    def test_retained_packet_has_views_after_the_callback(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        queued = queued_udp(callback=Packet.retain)
        packet = queued.deliver_one(b"hello")
        view = memoryview(packet)
        packet.set_payload(b"new")
        assert bytes(memoryview(packet)) == b"new"
        packet.set_payload(None)
        assert bytes(view[28:]) == bytes(memoryview(packet)[28:]) == b"hello"

    def test_view_that_was_made_in_the_callback_does_not_keep_the_payload_for_the_packet(
        self, queued_udp: Callable[..., QueuedUdp]
    ) -> None:
        views: list[memoryview] = []
        packet = queued_udp(callback=lambda packet: views.append(memoryview(packet))).deliver_one()
        with pytest.raises(RuntimeError, match=TOO_LATE):
            memoryview(packet)
        assert bytes(views[0][28:]) == b"hello"

"""The API for programs with a receive loop of their own: `netfilterqueue.lowlevel`.

Decoding and verdicts are tested without a kernel, by `handle_without_queues`; queues on the real
one. What is decoded from which message is for test_decode, as the decoder is the same.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from netfilterqueue._lowlevel import handle_without_queues

from messages import NFQA, Wire, attribute, packet_header, packet_message, simple_packets
from netfilterqueue import lowlevel
from netfilterqueue.lowlevel import (
    NF_ACCEPT,
    NF_DROP,
    NF_QUEUE,
    NF_REPEAT,
    NF_STOLEN,
    NF_STOP,
    NFQNL_COPY_META,
    NetfilterQueueData,
    NetfilterQueueHandle,
    NetfilterQueueQueueHandle,
)
from test_constants import headers_agree
from test_decode import DATAGRAMS, reference_decode
from test_malformed import A_VERDICT, NOT_PACKETS, error_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


TOO_LATE = "Parent queue has already been unbound"
CLOSED = "this handle is closed: open\\(\\) makes another"
UNKNOWN_FLAG = 1 << 30

GETTERS: dict[str, Callable[[NetfilterQueueData], Any]] = {
    name: getattr(NetfilterQueueData, name)
    for name in vars(NetfilterQueueData)
    if name.startswith("get_")
}


def accept(data: NetfilterQueueData) -> None:
    data.set_verdict(NF_ACCEPT)


def ignore(data: NetfilterQueueData) -> None:
    """A callback that decides nothing."""


def fail(data: NetfilterQueueData) -> None:
    raise ArithmeticError("of the callback")


@pytest.fixture
def handles() -> Iterator[Callable[..., NetfilterQueueHandle]]:
    """Make handles that have no queue of the kernel's, from callbacks by queue number."""
    with contextlib.ExitStack() as stack:

        def make(
            callbacks: dict[int, Callable[[NetfilterQueueData], Any]], wire: Wire | None = None
        ) -> NetfilterQueueHandle:
            handle: NetfilterQueueHandle
            handle = handle_without_queues(callbacks, fd=wire.fd if wire else -1)
            return stack.enter_context(contextlib.closing(handle))

        yield make


def is_readable(handle: NetfilterQueueHandle) -> bool:
    return bool(select.select([handle.fd()], [], [], 0)[0])


class TestNames:
    def test_readmes_constants_are_the_kernel_headers(self) -> None:
        values = {
            name: value for name, value in vars(lowlevel).items() if name.startswith(("NF_", "NFQ"))
        }
        assert len(values) == 14
        for name, value in values.items():
            assert type(value) is int
            assert headers_agree(name, value)

    @pytest.mark.parametrize(
        "cls", [NetfilterQueueHandle, NetfilterQueueQueueHandle, NetfilterQueueData]
    )
    def test_objects_cannot_be_made(self, cls: type) -> None:
        with pytest.raises(TypeError, match=r"(made by|comes from)"):
            cls()
        assert cls.__module__ == "netfilterqueue.lowlevel"

    def test_objects_that_nobody_made_raise(self) -> None:
        handle = NetfilterQueueHandle.__new__(NetfilterQueueHandle)
        for use in USES_OF_HANDLE.values():
            with pytest.raises(ValueError, match="closed"):
                use(handle)
        queue = NetfilterQueueQueueHandle.__new__(NetfilterQueueQueueHandle)
        for use_queue in USES_OF_QUEUE.values():
            with pytest.raises(ValueError, match="no handle's"):
                use_queue(queue)
        queue.destroy()
        data = NetfilterQueueData.__new__(NetfilterQueueData)
        for use_data in (*GETTERS.values(), accept):
            with pytest.raises(RuntimeError, match="has returned"):
                use_data(data)


USES_OF_HANDLE: dict[str, Callable[[NetfilterQueueHandle], Any]] = {
    "fd": lambda handle: handle.fd(),
    "bind_pf": lambda handle: handle.bind_pf(socket.AF_INET),
    "unbind_pf": lambda handle: handle.unbind_pf(socket.AF_INET),
    "create_queue": lambda handle: handle.create_queue(1, ignore),
    "handle_packet": lambda handle: handle.handle_packet(b""),
}
USES_OF_QUEUE: dict[str, Callable[[NetfilterQueueQueueHandle], Any]] = {
    "set_mode": lambda queue: queue.set_mode(NFQNL_COPY_META, 0),
    "set_flags": lambda queue: queue.set_flags(0, 0),
    "set_maxlen": lambda queue: queue.set_maxlen(1),
}


FULL = packet_message(
    packet_header(7),
    attribute(NFQA.MARK, struct.pack("!I", 0xFEDCBA98)),
    attribute(NFQA.TIMESTAMP, struct.pack("!QQ", 1700000000, 250000)),
    attribute(NFQA.IFINDEX_INDEV, struct.pack("!I", 1)),
    attribute(NFQA.IFINDEX_OUTDEV, struct.pack("!I", 2)),
    attribute(NFQA.IFINDEX_PHYSINDEV, struct.pack("!I", 3)),
    attribute(NFQA.IFINDEX_PHYSOUTDEV, struct.pack("!I", 4)),
    attribute(NFQA.HWADDR, struct.pack("!HH8s", 6, 0, b"\2\0\0\0\0\1zz")),
    attribute(NFQA.UID, struct.pack("!I", 0)),
    attribute(NFQA.GID, struct.pack("!I", 5)),
    attribute(NFQA.PAYLOAD, b"payload"),
)
FULL_VALUES = {
    "get_nfmark": 0xFEDCBA98,
    "get_timestamp": (1700000000, 250000),
    "get_indev": 1,
    "get_outdev": 2,
    "get_physindev": 3,
    "get_physoutdev": 4,
    "get_packet_hw": b"\2\0\0\0\0\1",
    "get_uid": 0,
    "get_gid": 5,
    "get_payload": b"payload",
}
ABSENT_VALUES = {
    "get_nfmark": 0,
    "get_timestamp": (0, 0),
    "get_indev": 0,
    "get_outdev": 0,
    "get_physindev": 0,
    "get_physoutdev": 0,
    "get_packet_hw": b"",
    "get_uid": None,
    "get_gid": None,
}


class TestData:
    def test_getters_tell_what_the_kernel_said(
        self, handles: Callable[..., NetfilterQueueHandle]
    ) -> None:
        told = {}

        def look(data: NetfilterQueueData) -> None:
            told.update({name: get(data) for name, get in GETTERS.items()})

        handles({0: look}).handle_packet(FULL)
        assert told == FULL_VALUES

    def test_what_is_absent_has_a_value_too(
        self, handles: Callable[..., NetfilterQueueHandle]
    ) -> None:
        told = {}

        def look(data: NetfilterQueueData) -> None:
            told.update({name: GETTERS[name](data) for name in ABSENT_VALUES})
            with pytest.raises(RuntimeError, match="Packet has no payload"):
                data.get_payload()

        handles({0: look}).handle_packet(packet_message(packet_header()))
        assert told == ABSENT_VALUES

    @pytest.mark.parametrize("use", [*GETTERS.values(), accept])
    @pytest.mark.parametrize("callback", [ignore, accept, fail])
    def test_data_cannot_be_used_after_its_callback(
        self,
        handles: Callable[..., NetfilterQueueHandle],
        callback: Callable[[NetfilterQueueData], None],
        use: Callable[[NetfilterQueueData], Any],
    ) -> None:
        kept = []

        def keep(data: NetfilterQueueData) -> None:
            kept.append(data)
            callback(data)

        with contextlib.suppress(ArithmeticError):
            handles({0: keep}).handle_packet(FULL)
        with pytest.raises(RuntimeError, match="this packet's callback has returned"):
            use(kept[0])


class TestVerdicts:
    @pytest.mark.parametrize(
        "verdict",
        [NF_DROP, NF_ACCEPT, NF_REPEAT, NF_STOP, NF_QUEUE | 7 << 16, NF_QUEUE | 0xFFFF8000],
    )
    @pytest.mark.parametrize("mark", [None, 0, 0xFFFFFFFF])
    def test_verdict_is_sent_as_set(
        self,
        handles: Callable[..., NetfilterQueueHandle],
        wire: Wire,
        verdict: int,
        mark: int | None,
    ) -> None:
        handle = handles({3: lambda data: data.set_verdict(verdict, mark=mark)}, wire)
        handle.handle_packet(*simple_packets(9, queue_num=3))
        [sent] = wire.verdicts()
        assert (sent.queue_num, sent.id) == (3, 9)
        assert (sent.verdict, sent.mark, sent.payload) == (verdict, mark, None)

    def test_verdict_is_executed_once_the_callback_exits(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        readable = []

        def decide(data: NetfilterQueueData) -> None:
            data.set_verdict(NF_ACCEPT)
            readable.append(wire.readable)

        handles({0: decide}, wire).handle_packet(*simple_packets(1))
        assert readable == [False]
        assert wire.ids() == [1]

    def test_last_verdict_of_a_callback_counts(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        def hesitate(data: NetfilterQueueData) -> None:
            data.set_verdict(NF_DROP, 5)
            data.set_verdict(NF_ACCEPT)

        handles({0: hesitate}, wire).handle_packet(*simple_packets(1))
        [sent] = wire.verdicts()
        assert (sent.verdict, sent.mark) == (NF_ACCEPT, None)
        assert not wire.readable

    def test_callback_without_a_verdict_leaves_the_packet_undecided(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        handles({0: ignore}, wire).handle_packet(*simple_packets(1))
        assert not wire.readable

    @pytest.mark.parametrize(
        ("verdict", "error"),
        [
            (NF_STOLEN, ValueError),
            (6, ValueError),
            (NF_ACCEPT | 1 << 16, ValueError),
            (NF_DROP | 0x8000, ValueError),
            (NF_QUEUE | 0x4000, ValueError),
            (-1, ValueError),
            (2**32, ValueError),
            ("accept", TypeError),
            (None, TypeError),
        ],
    )
    def test_verdict_that_cannot_be_given(
        self,
        handles: Callable[..., NetfilterQueueHandle],
        wire: Wire,
        verdict: Any,
        error: type[Exception],
    ) -> None:
        def decide(data: NetfilterQueueData) -> None:
            data.set_verdict(NF_DROP)
            with pytest.raises(error, match="verdict"):
                data.set_verdict(verdict)

        handles({0: decide}, wire).handle_packet(*simple_packets(1))
        # What is refused changes nothing.
        assert [sent.verdict for sent in wire.verdicts()] == [NF_DROP]

    @pytest.mark.parametrize(
        ("mark", "error"), [(-1, OverflowError), (2**32, OverflowError), ("1", TypeError)]
    )
    def test_mark_that_cannot_be_given(
        self,
        handles: Callable[..., NetfilterQueueHandle],
        wire: Wire,
        mark: Any,
        error: type[Exception],
    ) -> None:
        def decide(data: NetfilterQueueData) -> None:
            data.set_verdict(NF_DROP, 5)
            with pytest.raises(error, match="mark"):
                data.set_verdict(NF_ACCEPT, mark)

        handles({0: decide}, wire).handle_packet(*simple_packets(1))
        assert [(sent.verdict, sent.mark) for sent in wire.verdicts()] == [(NF_DROP, 5)]

    def test_verdict_that_cannot_be_sent(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        handle = handles({0: accept}, wire)
        wire.cut()
        with pytest.raises(OSError, match="verdicts could not be sent"):
            handle.handle_packet(*simple_packets(1))
        wire.mend()
        handle.handle_packet(*simple_packets(2))
        assert wire.ids() == [2]

    def test_capability_lost_is_told_when_the_kernel_says_so(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        handle = handles({0: accept}, wire)
        handle.handle_packet(*simple_packets(1))
        with pytest.raises(PermissionError, match="CAP_NET_ADMIN is needed"):
            handle.handle_packet(error_message(errno.EPERM, wire.verdicts()[0].sequence))
        handle.handle_packet(*simple_packets(2))
        assert wire.ids() == [2]

    def test_packet_that_has_left_the_queue_is_no_error(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        handle = handles({0: accept}, wire)
        handle.handle_packet(error_message(errno.ENOENT, A_VERDICT))
        handle.handle_packet(*simple_packets(1))
        assert wire.ids() == [1]


class TestExceptions:
    def test_packet_without_a_verdict_can_be_handled_again(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        calls = iter([fail, accept])

        def look(data: NetfilterQueueData) -> None:
            next(calls)(data)

        handle = handles({0: look}, wire)
        [datagram] = simple_packets(1)
        with pytest.raises(ArithmeticError, match="of the callback"):
            handle.handle_packet(datagram)
        assert not wire.readable
        handle.handle_packet(datagram)
        assert wire.ids() == [1]

    def test_verdict_set_before_is_executed(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        def decide_and_fail(data: NetfilterQueueData) -> None:
            accept(data)
            fail(data)

        with pytest.raises(ArithmeticError):
            handles({0: decide_and_fail}, wire).handle_packet(*simple_packets(1))
        assert wire.ids() == [1]

    def test_rest_of_the_datagram_comes_next(
        self, handles: Callable[..., NetfilterQueueHandle]
    ) -> None:
        seen = []

        def look(data: NetfilterQueueData) -> None:
            seen.append(data.get_payload())
            if len(seen) == 1:
                fail(data)

        handle = handles({0: look})
        one, two, three = (packet + bytes(-len(packet) % 4) for packet in simple_packets(1, 2, 3))
        with pytest.raises(ArithmeticError):
            handle.handle_packet(one + two)
        # The loop of the program comes back.
        assert is_readable(handle)
        handle.handle_packet(three)
        assert seen == [b"packet 1", b"packet 2", b"packet 3"]


class TestDatagrams:
    @pytest.mark.parametrize(
        "wrap", [bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))]
    )
    def test_any_bytes_like_object(
        self, handles: Callable[..., NetfilterQueueHandle], wrap: Callable[[bytes], Any]
    ) -> None:
        payloads = []
        handle = handles({0: lambda data: payloads.append(data.get_payload())})
        handle.handle_packet(wrap(simple_packets(1)[0]))
        assert payloads == [b"packet 1"]

    def test_buffer_may_change_meanwhile(
        self, handles: Callable[..., NetfilterQueueHandle]
    ) -> None:
        buffer = bytearray(simple_packets(1)[0])
        payloads = []

        def look(data: NetfilterQueueData) -> None:
            buffer.clear()
            payloads.append(data.get_payload())

        handles({0: look}).handle_packet(buffer)
        assert payloads == [b"packet 1"]

    @pytest.mark.parametrize("data", ["text", None, 7])
    def test_what_is_not_bytes_like(
        self, handles: Callable[..., NetfilterQueueHandle], data: Any
    ) -> None:
        with pytest.raises(TypeError, match="bytes-like"):
            handles({0: fail}).handle_packet(data)

    @pytest.mark.parametrize("datagram", [b"", *NOT_PACKETS.values()], ids=["", *NOT_PACKETS])
    def test_what_is_no_packet_is_skipped(
        self, handles: Callable[..., NetfilterQueueHandle], datagram: bytes
    ) -> None:
        handles({0: fail}).handle_packet(datagram)

    def test_packets_go_to_the_callback_of_their_queue(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        seen: list[tuple[int, bytes]] = []

        def keeping(number: int) -> Callable[[NetfilterQueueData], None]:
            return lambda data: seen.append((number, data.get_payload()))

        handle = handles({number: keeping(number) for number in (0, 1, 0xFFFF)}, wire)
        for number in (0xFFFF, 0, 2, 1, 0):
            handle.handle_packet(*simple_packets(number, queue_num=number))
        assert seen == [(n, b"packet %d" % n) for n in (0xFFFF, 0, 1, 0)]

    def test_callback_may_handle_another_datagram(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        [inner] = simple_packets(2)
        order: list[bytes] = []

        def look(data: NetfilterQueueData) -> None:
            accept(data)
            if data.get_payload() == b"packet 1":
                handle.handle_packet(inner)
            order.append(data.get_payload())

        handle = handles({0: look}, wire)
        handle.handle_packet(*simple_packets(1))
        assert order == [b"packet 2", b"packet 1"]
        assert [wire.ids(), wire.ids()] == [[2], [1]]

    @settings(derandomize=True, database=None, deadline=None, max_examples=300)
    @given(DATAGRAMS)
    def test_any_datagrams_give_what_is_in_them_and_nothing_else(
        self, datagrams: list[bytes]
    ) -> None:
        numbers = (0, 0x1234)
        found: list[tuple[Any, ...]] = []

        def keeping(number: int) -> Callable[[NetfilterQueueData], None]:
            def keep(data: NetfilterQueueData) -> None:
                try:
                    payload = data.get_payload()
                except RuntimeError:
                    payload = None
                getters = [get for name, get in GETTERS.items() if name != "get_payload"]
                found.append((number, data.get_nfmark(), payload, *(get(data) for get in getters)))

            return keep

        handle = handle_without_queues({number: keeping(number) for number in numbers})
        with contextlib.closing(handle):
            for datagram in datagrams:
                # A datagram may claim that verdicts were refused for lack of the capability.
                with contextlib.suppress(PermissionError):
                    handle.handle_packet(datagram)
            with contextlib.suppress(PermissionError):
                handle.handle_packet(b"")
        # Of a packet as the reference decodes it: 3 is its queue, 4 its mark, -3 its payload.
        packets = [one for datagram in datagrams for one in reference_decode(datagram)[0]]
        expected = [(one[3], one[4], one[-3]) for one in packets if one[3] in numbers]
        assert [one[:3] for one in found] == expected

    def test_callback_may_close_its_handle(
        self, handles: Callable[..., NetfilterQueueHandle], wire: Wire
    ) -> None:
        def close(data: NetfilterQueueData) -> None:
            data.set_verdict(NF_ACCEPT)
            handle.close()
            assert data.get_payload() == b"packet 1"
            with pytest.raises(RuntimeError, match=TOO_LATE):
                data.set_verdict(NF_DROP)

        handle = handles({0: close}, wire)
        handle.handle_packet(b"".join(simple_packets(1, 2)))
        assert [sent.verdict for sent in wire.verdicts()] == [NF_ACCEPT]
        assert not wire.readable

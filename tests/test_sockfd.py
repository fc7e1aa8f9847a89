"""`NetfilterQueue(sockfd=...)`: a netlink socket that somebody else opened, perhaps elsewhere."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from messages import unbind_request
from netfilterqueue import NetfilterQueue, Packet
from support import RECEIVE_BUFFER, bound_queues, run_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.testing import Node
    from support import Program, Traffic, UdpFlow

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
OPEN_IT_WITH = "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)"


@pytest.fixture
def given(router: Node) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as opened:
        yield opened


def accept_one(queue: NetfilterQueue, queue_num: int, flow: UdpFlow) -> None:
    """Bind, let a datagram through, unbind."""
    payloads: list[bytes] = []

    def accept(packet: Packet) -> None:
        payloads.append(packet.get_payload())
        packet.accept()

    queue.bind(queue_num, accept, sock_len=RECEIVE_BUFFER)
    flow.send(b"hello")
    run_until(queue, lambda: payloads)
    assert flow.receive() == b"hello"
    queue.unbind()
    assert [payload[-5:] for payload in payloads] == [b"hello"]


class TestGivenSocket:
    def test_queue_uses_a_duplicate(
        self, given: socket.socket, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        with NetfilterQueue(sockfd=given.fileno()) as queue:
            assert queue.fileno() != given.fileno()
            assert os.path.sameopenfile(queue.fileno(), given.fileno())
            assert not os.get_inheritable(queue.fileno())
            accept_one(queue, queue_num, queued())

    def test_it_stays_open_and_usable_after_close(
        self, given: socket.socket, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        for _ in range(3):
            with NetfilterQueue(sockfd=given.fileno()) as queue:
                accept_one(queue, queue_num, flow)
            assert not bound_queues()
            assert given.getsockname()[0] != 0

    def test_it_may_be_closed_while_the_queue_is_bound(
        self, given: socket.socket, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        with NetfilterQueue(sockfd=given.fileno()) as queue:
            given.close()
            accept_one(queue, queue_num, queued())

    def test_it_may_have_an_address_already(
        self, given: socket.socket, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        given.bind((0, 0))
        port_id = given.getsockname()[0]
        with NetfilterQueue(sockfd=given.fileno()) as queue:
            queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
            assert bound_queues()[queue_num].port_id == port_id
            queue.unbind()
            accept_one(queue, queue_num, queued())

    def test_what_was_left_in_it_is_no_packet_of_this_queue(
        self, given: socket.socket, queue_num: int, queued: Callable[..., UdpFlow]
    ) -> None:
        flow = queued()
        with NetfilterQueue(sockfd=given.fileno()) as first:
            first.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
            flow.send(b"old", b"old")
            # Not by its method, which reads the socket empty.
            given.send(unbind_request(queue_num))
            with NetfilterQueue(sockfd=given.fileno()) as second:
                accept_one(second, queue_num, flow)

    def test_default_is_a_socket_of_its_own(self, given: socket.socket) -> None:
        with NetfilterQueue() as one, NetfilterQueue(sockfd=-1) as two:
            assert not os.path.sameopenfile(one.fileno(), two.fileno())
            assert not os.path.sameopenfile(one.fileno(), given.fileno())


class TestOtherNamespace:
    """A socket belongs to the namespace that it was opened in, whoever uses it."""

    @pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
    def test_it_controls_that_namespaces_queue(
        self,
        hosts: tuple[Node, Node],
        queue_num: int,
        traffic: Traffic,
        ipv6: bool,
    ) -> None:
        left, _ = hosts
        flow = traffic.udp("input", ipv6=ipv6)
        rule = left.rule("OUTPUT", "-p", "udp", "--dport", flow.port, queue=queue_num, ipv6=ipv6)
        with left.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as opened, rule:
            with NetfilterQueue(sockfd=opened.fileno()) as queue:
                packets: list[Packet] = []
                queue.bind(queue_num, packets.append, sock_len=RECEIVE_BUFFER)
                assert list(bound_queues(left)) == [queue_num]
                assert not bound_queues()
                flow.send(b"1", b"2")
                run_until(queue, lambda: len(packets) == 2)
                for packet in packets:
                    packet.accept()
                assert flow.receive_all(2) == [b"1", b"2"]
            assert not bound_queues(left)

    def test_the_same_number_in_two_namespaces(
        self, hosts: tuple[Node, Node], queue: NetfilterQueue, queue_num: int
    ) -> None:
        left, _ = hosts
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        with left.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as opened:
            with NetfilterQueue(sockfd=opened.fileno()) as other:
                other.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
                assert list(bound_queues()) == list(bound_queues(left)) == [queue_num]

    def test_who_holds_a_number_there_is_sought_there(
        self,
        hosts: tuple[Node, Node],
        run_program: Callable[..., Program],
        queue: NetfilterQueue,
        queue_num: int,
    ) -> None:
        """This process has the number in its own namespace, and is not who is in the way there."""
        left, _ = hosts
        program = run_program(
            """
            import sys
            from netfilterqueue import NetfilterQueue
            queue = NetfilterQueue()
            queue.bind(int(sys.argv[1]), print, sock_len=65536)
            print("bound")
            queue.run()
            """,
            str(queue_num),
            node=left,
        )
        program.wait_for("bound")
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        there = bound_queues(left)[queue_num].port_id
        with left.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as opened:
            with NetfilterQueue(sockfd=opened.fileno()) as other:
                with pytest.raises(PermissionError, match=f"taken by port id {there},"):
                    other.bind(queue_num, print, sock_len=RECEIVE_BUFFER)


class TestWrongDescriptor:
    @pytest.mark.parametrize(
        "arguments",
        [
            (socket.AF_INET, socket.SOCK_DGRAM, 0),
            (socket.AF_UNIX, socket.SOCK_STREAM, 0),
            (socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE),
        ],
        ids=["inet", "unix", "another family of netlink"],
    )
    def test_another_kind_of_socket(self, router: Node, arguments: tuple[int, int, int]) -> None:
        with socket.socket(*arguments) as wrong:
            with pytest.raises(ValueError, match="is no netlink socket of the netfilter") as caught:
                NetfilterQueue(sockfd=wrong.fileno())
            assert f"sockfd {wrong.fileno()}" in str(caught.value)
            assert OPEN_IT_WITH in str(caught.value)
            # It still is what it was, and its owner's.
            assert wrong.fileno() >= 0
            os.fstat(wrong.fileno())

    def test_no_socket(self) -> None:
        with Path(os.devnull).open("rb") as file:
            with pytest.raises(OSError, match=f"descriptor {file.fileno()}") as caught:
                NetfilterQueue(sockfd=file.fileno())
        assert caught.value.errno == errno.ENOTSOCK

    def test_no_descriptor(self) -> None:
        descriptor = os.dup(0)
        os.close(descriptor)
        with pytest.raises(OSError, match=f"descriptor {descriptor}") as caught:
            NetfilterQueue(sockfd=descriptor)
        assert caught.value.errno == errno.EBADF

    @pytest.mark.parametrize("value", [-2, -1000])
    def test_number_out_of_range(self, value: int) -> None:
        with pytest.raises(ValueError, match=f"sockfd is {value}, but must be"):
            NetfilterQueue(sockfd=value)

    @pytest.mark.parametrize("value", ["3", None, 3.0], ids=repr)
    def test_no_integer(self, value: Any) -> None:
        with pytest.raises(TypeError):
            NetfilterQueue(sockfd=value)

    def test_nothing_stays_open(self, router: Node) -> None:
        before = os.listdir("/proc/self/fd")
        with socket.socket() as wrong:
            for _ in range(10):
                with pytest.raises(ValueError, match="is no netlink socket"):
                    NetfilterQueue(sockfd=wrong.fileno())
        assert os.listdir("/proc/self/fd") == before

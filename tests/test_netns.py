"""`NetfilterQueue(netns=...)`: the queue of another network namespace; and a socket from there."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from netfilterqueue import NetfilterQueue, Packet, Verdict
from netfilterqueue.stats import kernel_queues
from support import (
    CAP_SYS_ADMIN,
    RECEIVE_BUFFER,
    TIMEOUT,
    bound_queues,
    run_until,
    without_capability,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.testing import Node
    from support import Program, Traffic, UdpFlow

HERE = "/proc/thread-self/ns/net"


def opened(node: Node, stack: ExitStack) -> Any:
    return stack.enter_context(Path(f"/proc/{node.pid}/ns/net").open("rb"))


# Ways to name a node's namespace.
NAMES: dict[str, Callable[[Node, ExitStack], Any]] = {
    "pid": lambda node, stack: node.pid,
    "path": lambda node, stack: f"/proc/{node.pid}/ns/net",
    "bytes": lambda node, stack: b"/proc/%d/ns/net" % node.pid,
    "path object": lambda node, stack: Path(f"/proc/{node.pid}/ns/net"),
    "descriptor": lambda node, stack: opened(node, stack).fileno(),
    "file": opened,
}


@pytest.fixture
def left(hosts: tuple[Node, Node]) -> Node:
    return hosts[0]


@pytest.fixture(params=NAMES)
def netns(request: pytest.FixtureRequest, left: Node) -> Iterator[Any]:
    """The left host's namespace, by one of the names."""
    with ExitStack() as stack:
        yield NAMES[request.param](left, stack)


@pytest.fixture
def flow(left: Node, queue_num: int, traffic: Traffic) -> Iterator[UdpFlow]:
    """Datagrams from the left host, which go to a queue there."""
    made = traffic.udp("input")
    with left.rule("OUTPUT", "-p", "udp", "--dport", made.port, queue=queue_num):
        yield made


def check_that_it_serves(queue: NetfilterQueue, queue_num: int, flow: UdpFlow, node: Node) -> None:
    """Bind, let datagrams of a node pass, and look at what is told of them."""
    packets: list[Packet] = []

    def keep_and_accept(packet: Packet) -> Verdict:
        packets.append(packet)
        return Verdict.ACCEPT

    queue.bind(queue_num, keep_and_accept, sock_len=RECEIVE_BUFFER)
    assert not bound_queues()
    flow.send(b"1", b"2")
    run_until(queue, lambda: len(packets) == 2)
    assert flow.receive_all(2) == [b"1", b"2"]
    assert [packet.outdev_name for packet in packets] == [node.interfaces[0]] * 2
    assert queue.stats().kernel == bound_queues(node)[queue_num]
    queue.unbind()
    assert not bound_queues(node)


class TestNamespace:
    def test_its_queue_is_served(
        self, netns: Any, left: Node, queue_num: int, flow: UdpFlow
    ) -> None:
        with NetfilterQueue(netns=netns) as queue:
            assert not os.get_inheritable(queue.fileno())
            check_that_it_serves(queue, queue_num, flow, left)

    def test_thread_stays_where_it_is_and_nothing_is_left_open(self, netns: Any) -> None:
        before = os.readlink(HERE), os.listdir("/proc/self/fd")
        for _ in range(5):
            NetfilterQueue(netns=netns).close()
            kernel_queues(netns)
        assert (os.readlink(HERE), os.listdir("/proc/self/fd")) == before

    def test_own_namespace_can_be_named_too(self, router: Node, queue_num: int) -> None:
        with NetfilterQueue(netns=os.getpid()) as queue:
            queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
            assert list(kernel_queues(HERE)) == list(kernel_queues()) == [queue_num]
            assert queue.stats().kernel == kernel_queues()[queue_num]

    def test_its_queues_can_be_listed(
        self, netns: Any, left: Node, queue: NetfilterQueue, queue_num: int
    ) -> None:
        queue.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
        with NetfilterQueue(netns=left.pid) as other:
            other.bind(queue_num + 1, print, sock_len=RECEIVE_BUFFER, range=100)
            rows = kernel_queues(netns)
            assert list(rows) == [queue_num + 1]
            assert (rows[queue_num + 1].queue_num, rows[queue_num + 1].copy_range) == (
                queue_num + 1,
                100,
            )
            assert list(kernel_queues()) == [queue_num]

    def test_who_holds_a_number_there_is_named(self, left: Node, queue_num: int) -> None:
        with NetfilterQueue(netns=left.pid) as first, NetfilterQueue(netns=left.pid) as second:
            first.bind(queue_num, print, sock_len=RECEIVE_BUFFER)
            holder = bound_queues(left)[queue_num].port_id
            with pytest.raises(PermissionError, match=f"taken by port id {holder}"):
                second.bind(queue_num, print, sock_len=RECEIVE_BUFFER)


class TestSocketSentFromThere:
    def test_its_queue_is_served(
        self,
        left: Node,
        queue_num: int,
        flow: UdpFlow,
        run_program: Callable[..., Program],
        tmp_path: Path,
    ) -> None:
        address = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            listener.settimeout(TIMEOUT)
            program = run_program(
                """
                import socket, sys
                opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(sys.argv[1])
                    socket.send_fds(connection, [b"here"], [opened.fileno()])
                """,
                address,
                node=left,
            )
            with closing(listener.accept()[0]) as connection:
                _, (descriptor,), _, _ = socket.recv_fds(connection, 16, 1)
        program.run()
        # Its process has ended meanwhile.
        with socket.socket(fileno=descriptor) as sent:
            with NetfilterQueue(sockfd=sent.fileno()) as queue:
                check_that_it_serves(queue, queue_num, flow, left)


class TestErrors:
    def test_not_together_with_a_socket(self, router: Node) -> None:
        with NetfilterQueue() as queue:
            with pytest.raises(ValueError, match="sockfd and netns exclude each other"):
                NetfilterQueue(sockfd=queue.fileno(), netns=os.getpid())

    @pytest.mark.parametrize("by", ["path", "file"])
    def test_other_files(self, router: Node, by: str) -> None:
        with Path(os.devnull).open("rb") as file:
            with pytest.raises(ValueError, match="is no network namespace: pass a pid"):
                NetfilterQueue(netns=file if by == "file" else os.devnull)

    def test_other_namespaces(self, router: Node) -> None:
        with pytest.raises(ValueError, match="is no network namespace: pass a pid"):
            NetfilterQueue(netns="/proc/self/ns/mnt")

    @pytest.mark.parametrize("netns", [2**31 - 1, "/run/netns/none"])
    def test_there_is_none(self, router: Node, netns: Any) -> None:
        with pytest.raises(FileNotFoundError, match="cannot open /"):
            NetfilterQueue(netns=netns)

    @pytest.mark.parametrize("netns", ["blue", Path("blue"), b"blue"])
    def test_name_instead_of_a_path(self, router: Node, netns: Any) -> None:
        with pytest.raises(FileNotFoundError, match="is passed as /run/netns/blue"):
            NetfilterQueue(netns=netns)

    @pytest.mark.parametrize("netns", [-1, 2**31])
    def test_number_out_of_range(self, router: Node, netns: int) -> None:
        with pytest.raises(ValueError, match=f"netns is {netns}, but must be"):
            NetfilterQueue(netns=netns)

    def test_other_types(self, router: Node) -> None:
        with pytest.raises(TypeError, match="netns must be an integer"):
            NetfilterQueue(netns=1.5)  # type: ignore[arg-type]

    def test_without_the_capability(self, left: Node) -> None:
        with without_capability(CAP_SYS_ADMIN), pytest.raises(PermissionError) as caught:
            NetfilterQueue(netns=left.pid)
        assert caught.value.errno == errno.EPERM
        assert "CAP_SYS_ADMIN" in str(caught.value)
        assert "pass it as sockfd" in str(caught.value)

    @pytest.mark.parametrize("netns", ["/dev/null", "/run/netns/none", -1])
    def test_nothing_stays_open(self, router: Node, netns: Any) -> None:
        before = os.listdir("/proc/self/fd")
        for _ in range(5):
            with pytest.raises((OSError, ValueError)):
                NetfilterQueue(netns=netns)
        assert os.listdir("/proc/self/fd") == before

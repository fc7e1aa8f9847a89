"""What ``mypy --strict`` must make of a program that runs a queue. Checked, never executed.

A line that must be refused carries the ignore of exactly its error: mypy reports the ignore as
unused as soon as the line is accepted.
"""

from __future__ import annotations

import functools
import socket
from pathlib import Path

from typing_extensions import Literal, assert_type

import netfilterqueue
from netfilterqueue import COPY_META, COPY_PACKET, PROTOCOLS, Hook, NetfilterQueue, Packet, Verdict
from netfilterqueue.conntrack import Conntrack, ConntrackState, ConntrackStatus, ConntrackTuple
from netfilterqueue.stats import KernelQueue, QueueStats, kernel_queues
from netfilterqueue.vlan import Vlan


def accept(packet: Packet) -> None:
    packet.accept()


def decide(packet: Packet) -> Verdict:
    return Verdict.DROP if packet.mark else Verdict.ACCEPT


def decide_some(packet: Packet) -> Verdict | None:
    return Verdict.DROP if packet.mark else None


def answer_with_a_number(packet: Packet) -> int:
    return packet.mark


def callback_with_an_argument(label: str, packet: Packet) -> None:
    print(label, packet)


class Filter:
    def inspect(self, packet: Packet) -> None:
        packet.drop()


class Counting(NetfilterQueue):
    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def handle(self, packet: Packet) -> None:
        packet.accept()


def callbacks(queue: NetfilterQueue) -> None:
    queue.bind(1, accept)
    queue.bind(1, decide)
    queue.bind(1, decide_some)
    queue.bind(1, lambda packet: packet.accept())
    queue.bind(1, Filter().inspect)
    queue.bind(1, functools.partial(callback_with_an_argument, "queue 1"))
    queue.bind(1, answer_with_a_number)  # type: ignore[arg-type]
    queue.bind(1, callback_with_an_argument)  # type: ignore[arg-type]


def bind_arguments(queue: NetfilterQueue) -> None:
    queue.bind(1, accept, 100, COPY_PACKET, 65535, 1 << 20)
    queue.bind(queue_num=1, user_callback=accept, max_len=100, mode=COPY_META, range=20, sock_len=1)
    queue.bind(1, callback=accept, timestamps=False, batch=1, verdict_delay=0)
    queue.bind(1, default_verdict=Verdict.DROP)
    queue.bind(1, default_verdict="drop")  # type: ignore[arg-type]
    queue.bind(1, fail_open=True, gso=True, conntrack=True, uid_gid=True, secctx=True)
    queue.bind("1", accept)  # type: ignore[arg-type]
    queue.bind(1, accept, 100, COPY_PACKET, 65535, 1 << 20, accept)  # type: ignore[call-arg]


def changes(queue: NetfilterQueue) -> None:
    queue.set_mode(COPY_PACKET, 100)
    queue.set_max_len(100)
    queue.set_flags(fail_open=True, gso=False, conntrack=None)
    queue.set_flags(uid_gid=True, secctx=True)
    queue.set_flags(fail_closed=True)  # type: ignore[call-arg]


def life_of_a_queue() -> None:
    with NetfilterQueue() as queue:
        assert_type(queue, NetfilterQueue)
        assert_type(queue.get_fd(), int)
        assert_type(queue.fileno(), int)
        queue.run()
        queue.run(False)
        queue.run(block=False)
        with socket.fromfd(queue.get_fd(), socket.AF_NETLINK, socket.SOCK_RAW) as sock:
            queue.run_socket(sock)
        queue.run_socket(queue)  # type: ignore[arg-type]
        queue.stop()
        queue.unbind()
        queue.close()
    NetfilterQueue(af=socket.AF_INET6, sockfd=3)
    with open("/proc/self/ns/net", "rb") as namespace:
        for netns in (1, "/run/netns/blue", b"/run/netns/blue", Path("blue"), namespace):
            NetfilterQueue(netns=netns)
    NetfilterQueue(netns=1.5)  # type: ignore[arg-type]
    NetfilterQueue(3)  # type: ignore[call-arg]


def statistics(queue: NetfilterQueue) -> None:
    found = queue.stats()
    assert_type(found, QueueStats)
    assert_type(found.verdicts[Verdict.ACCEPT], int)
    assert_type(found.kernel, "KernelQueue | None")
    assert_type(kernel_queues()[1], KernelQueue)
    found.packets = 1  # type: ignore[misc]


def subclass() -> None:
    with Counting("queue 1") as queue:
        assert_type(queue, Counting)
        queue.bind(1)
        queue.bind(1, mode=NetfilterQueue.COPY_META)


def packet_members(packet: Packet) -> None:
    assert_type(packet.id, int)
    assert_type(packet.hook, int)
    assert_type(Hook(packet.hook), Hook)
    assert_type(packet.hw_protocol, int)
    assert_type(packet.mark, int)
    assert_type(packet.indev, int)
    assert_type(packet.outdev, int)
    assert_type(packet.physindev, int)
    assert_type(packet.physoutdev, int)
    assert_type(packet.queue_num, int)
    assert_type(packet.uid, "int | None")
    assert_type(packet.gid, "int | None")
    assert_type(packet.indev_name, "str | None")
    assert_type(packet.outdev_name, "str | None")
    assert_type(packet.physindev_name, "str | None")
    assert_type(packet.physoutdev_name, "str | None")
    assert_type(packet.secctx, "str | None")
    assert_type(packet.conntrack, "Conntrack | None")
    assert_type(packet.vlan, "Vlan | None")
    assert_type(packet.l2_header, "bytes | None")
    assert_type(packet.priority, int)
    assert_type(packet.cgroup_classid, int)
    assert_type(packet.original_len, int)
    assert_type(packet.truncated, bool)
    assert_type(packet.checksum_ready, bool)
    assert_type(packet.checksum_verified, bool)
    assert_type(packet.gso, bool)
    assert_type(packet.verdict, "Verdict | None")
    assert_type(packet.get_payload(), bytes)
    assert_type(packet.get_payload_len(), int)
    assert_type(packet.get_hw(), "bytes | None")
    assert_type(packet.get_timestamp(), float)
    assert_type(packet.get_mark(), int)
    assert_type(bytes(packet), bytes)
    assert_type(len(packet), int)
    with memoryview(packet) as view:
        assert_type(view[0], int)
    packet.id = 1  # type: ignore[misc]


def connection(conntrack: Conntrack) -> None:
    assert conntrack.state is ConntrackState.NEW
    assert_type(conntrack.state, Literal[ConntrackState.NEW])
    assert_type(conntrack.status, ConntrackStatus)
    assert_type(conntrack.original, ConntrackTuple)
    assert_type(conntrack.reply.source, "str | None")
    assert_type(conntrack.reply.source_port, "int | None")
    assert_type(conntrack.timeout, "int | None")
    assert_type(conntrack.labels, "bytes | None")
    assert_type(conntrack.mark, int)
    assert_type(Vlan(0x8100, 5).tci, int)


def packet_decisions(packet: Packet) -> None:
    packet.retain()
    packet.set_mark(0xFFFFFFFF)
    packet.set_payload(b"")
    packet.set_payload(bytearray(20))
    packet.set_payload(memoryview(b"")[4:])
    packet.set_payload(packet)
    packet.set_payload(None)
    assert_type(packet.set_payload(b"", checksums=True), bool)
    packet.set_payload(b"", True)  # type: ignore[call-arg]
    packet.set_payload("text")  # type: ignore[arg-type]
    packet.accept()
    packet.drop()
    packet.repeat()
    packet.stop()
    packet.requeue(2)
    packet.requeue(2, bypass=True)
    packet.requeue("2")  # type: ignore[arg-type]


def packet_changes(packet: Packet) -> None:
    packet.set_priority(0x10002)
    packet.set_conntrack_mark(1)
    packet.set_conntrack_labels(bytes(16))
    packet.set_vlan(0x8100, 5)
    packet.set_vlan(*Vlan(0x8100, 5))
    packet.set_l2_header(bytearray(14))
    packet.set_payload(bytes(20), truncate=True)
    packet.set_priority("1")  # type: ignore[arg-type]
    packet.set_l2_header("1")  # type: ignore[arg-type]


def module_members() -> None:
    assert_type(PROTOCOLS[6], str)
    assert_type(netfilterqueue.BUFFER_SIZE, int)
    assert_type(netfilterqueue.__version__, str)
    assert_type(netfilterqueue.VERSION, "tuple[int, ...]")
    assert_type(netfilterqueue.COPY_NONE, int)

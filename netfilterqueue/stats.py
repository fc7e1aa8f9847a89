"""Statistics: what a queue object has counted, and what the kernel counts for every queue."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Union

from netfilterqueue._netns import namespace_named, namespace_of, open_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from netfilterqueue.constants import Verdict


class HasFileno(Protocol):
    def fileno(self) -> int: ...


# How users name a network namespace.
Namespace = Union[int, str, bytes, "os.PathLike[str]", HasFileno]

__all__ = ["KernelQueue", "QueueStats", "kernel_queues"]

# Of the thread that opens them.
KERNEL_QUEUES = b"/proc/thread-self/net/netfilter/nfnetlink_queue"
KERNEL_LOGS = b"/proc/thread-self/net/netfilter/nfnetlink_log"


@dataclass(frozen=True)
class KernelQueue:
    """What the kernel says about a bound queue: a line of /proc/net/netfilter/nfnetlink_queue.

    The counters have 32 bits and start anew with each bind.
    """

    queue_num: int
    port_id: int  #: of the socket that owns it: mostly the process id of the program
    depth: int  #: packets that wait for a verdict
    copy_mode: int  #: 0, 1, 2 for COPY_NONE, COPY_META, COPY_PACKET
    copy_range: int  #: bytes
    dropped_full: int  #: packets dropped as so many waited already as `max_len` allows
    dropped_socket: int  #: packets dropped as the receive buffer was full, or the packet not copied
    id_sequence: int  #: id of the latest packet, hence their number


@dataclass(frozen=True)
class QueueStats:
    """What a NetfilterQueue has counted since it was made, over all its bindings."""

    packets: int  #: handed to the program
    bytes: int  #: of payload in them, as they came
    batches: int  #: reads that brought packets, a system call each
    truncated: int  #: packets of which only the beginning was copied
    verdicts: Mapping[Verdict, int]  #: given, by the program or by default, if sent or not
    abandoned: int  #: packets collected undecided while their queue was bound
    verdict_errors: Mapping[int, int]  #: verdicts that the kernel refused later, by errno
    request_errors: int  #: refusals of requests that nobody waited for
    overruns: int  #: messages that the kernel dropped as the receive buffer was full
    malformed: int  #: messages without a readable packet id, or no netlink messages at all
    foreign: int  #: messages that are not about packets
    broken_attributes: int  #: attributes skipped for their length
    unread_attributes: int  #: attributes skipped as this library does not read their type
    kernel: KernelQueue | None  #: None: not bound, or not to be read from here


def kernel_queues(netns: Namespace | None = None) -> dict[int, KernelQueue]:
    """All queues that are bound in this thread's network namespace, by number.

    ``netns``: another namespace, by pid, path or descriptor, as for NetfilterQueue. Empty where
    nobody has used a queue yet. Raises PermissionError where the kernel shows them to root only.
    """
    if netns is None:
        return queues_in(None)
    namespace = namespace_named(netns)
    try:
        return queues_in(namespace)
    finally:
        os.close(namespace)


def queues_beside(sockfd: int) -> dict[int, KernelQueue]:
    """All queues of the network namespace that a socket belongs to."""
    namespace = namespace_of(sockfd)
    try:
        return queues_in(namespace)
    finally:
        os.close(namespace)


def queues_in(namespace: int | None) -> dict[int, KernelQueue]:
    rows = table(KERNEL_QUEUES, namespace)
    return {number: KernelQueue(*fields[:8]) for number, fields in rows.items()}


def table(path: bytes, namespace: int | None = None) -> dict[int, list[int]]:
    """The lines of one of the kernel's tables, by the number that each begins with."""
    try:
        if namespace is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            descriptor = open_table(namespace, path)
    except FileNotFoundError:
        return {}  # the kernel's module comes with the first that is bound
    with open(descriptor, encoding="ascii") as file:
        rows = [[int(field) for field in line.split()] for line in file]
    return {fields[0]: fields for fields in rows}

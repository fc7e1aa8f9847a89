"""Errors of the kernel, put so that the reader knows what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# Of the calling thread's network namespace, which need not be the socket's.
KERNEL_QUEUES = Path("/proc/thread-self/net/netfilter/nfnetlink_queue")

CAPABILITY = (
    "CAP_NET_ADMIN is needed in the socket's network namespace: run as root, give the interpreter "
    "the capability (setcap cap_net_admin+ep), or work in a user and network namespace of your own "
    "(unshare --user --map-root-user --net)"
)


CAP_NET_ADMIN = 12  # <linux/capability.h>


def has_net_admin() -> bool:
    """Whether the calling thread has the capability at all, over whatever network namespace."""
    try:
        status = Path("/proc/thread-self/status").read_text()
    except OSError:
        return True
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> CAP_NET_ADMIN & 1)


def holder_of(queue_num: int) -> int | None:
    """The port id that has this queue bound, or None where it cannot be known."""
    try:
        rows = KERNEL_QUEUES.read_text().splitlines()
    except OSError:
        return None
    for row in rows:
        fields = row.split()
        if len(fields) >= 2 and fields[0] == str(queue_num):
            return int(fields[1])
    return None


def name_of(port_id: int) -> str:
    """The first socket of a process has its process id for a port id."""
    try:
        command = Path(f"/proc/{port_id}/comm").read_text().strip()
    except OSError:
        return f"port id {port_id}"
    return f"port id {port_id}, probably process {port_id} ({command})"


def bind_refused(queue_num: int, error: int, own_port_id: int, *, elsewhere: bool) -> OSError:
    """The exception for a refused bind request; PermissionError where errno is EPERM.

    ``elsewhere``: the socket can belong to another network namespace than the calling thread.
    """
    holder = None
    if error == errno.EPERM and not elsewhere:
        holder = holder_of(queue_num)
    if error == errno.EBUSY:
        why = f"the number is taken by port id {own_port_id}, which is this very socket"
    elif error == errno.EPERM and not has_net_admin():
        why = CAPABILITY
    elif holder is not None:
        why = f"the number is taken by {name_of(holder)}; end that program or use another number"
    elif error == errno.EPERM:
        why = f"{CAPABILITY}, unless another program holds the number there"
    elif error == errno.EINVAL:
        why = "the kernel lacks NFQUEUE: load it with modprobe nfnetlink_queue"
    else:
        why = reason(error)
    return OSError(error, f"Failed to create queue {queue_num}: {why}")


def bind_unanswered(queue_num: int) -> OSError:
    return OSError(
        errno.ENOBUFS,
        f"Failed to create queue {queue_num}: the kernel's answer was lost; let nobody else read "
        "this socket, or use a larger receive buffer (sock_len)",
    )


def reason(error: int) -> str:
    return CAPABILITY if error == errno.EPERM else os.strerror(error)


def unbind_refused(queue_num: int, error: int) -> OSError:
    return OSError(error, f"Failed to unbind queue {queue_num}: {reason(error)}")


def refused(action: str, error: int) -> OSError:
    """The exception for a request that changes something else than who has a queue."""
    if error == errno.EOPNOTSUPP:
        why = "this kernel lacks what it takes"
    elif error == errno.ENODEV:
        why = "the queue is not bound any more"
    elif error == errno.ENOBUFS:
        why = "the kernel's answer was lost; a larger receive buffer makes that less likely"
    else:
        why = reason(error)
    return OSError(error, f"Failed to {action}: {why}")


def verdicts_not_sent(error: int) -> OSError:
    return OSError(
        error,
        f"verdicts could not be sent: {reason(error)}. The packets concerned are still undecided",
    )

"""Errors of the kernel, put so that the reader knows what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from netfilterqueue.stats import KERNEL_LOGS, queues_beside, table

CAPABILITY = (
    "CAP_NET_ADMIN is needed in the socket's network namespace: run as root, give the interpreter "
    "the capability (setcap cap_net_admin+ep), or work in a user and network namespace of your own "
    "(unshare --user --map-root-user --net)"
)


# What a flag takes that not every kernel of today has.
FLAG_NEEDS = {
    "conntrack": "the module nf_conntrack_netlink (modprobe nf_conntrack_netlink) of a kernel with "
    "CONFIG_NETFILTER_NETLINK_GLUE_CT",
    "secctx": "a kernel with CONFIG_NETWORK_SECMARK",
}

CAP_NET_ADMIN = 12  # <linux/capability.h>


def has_net_admin() -> bool:
    """Whether the calling thread has the capability at all, over whatever network namespace."""
    try:
        status = Path("/proc/thread-self/status").read_text()
    except OSError:
        return True
    effective = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> CAP_NET_ADMIN & 1)


def holder_of_queue(queue_num: int, sockfd: int) -> int | None:
    """The port id that has this queue bound in the socket's network namespace, or None where it
    cannot be known."""
    try:
        queue = queues_beside(sockfd).get(queue_num)
    except OSError:
        return None
    return queue.port_id if queue else None


def holder_of_group(group: int) -> int | None:
    try:
        row = table(KERNEL_LOGS).get(group)
    except OSError:
        return None
    return row[1] if row else None


def name_of(port_id: int) -> str:
    """The first socket of a process has its process id for a port id."""
    try:
        command = Path(f"/proc/{port_id}/comm").read_text().strip()
    except OSError:
        return f"port id {port_id}"
    return f"port id {port_id}, probably process {port_id} ({command})"


def not_permitted(holder: int | None) -> str:
    """Why the kernel says EPERM to who asks for a number that this port id holds, if anybody."""
    if not has_net_admin():
        return CAPABILITY
    if holder is None:
        return f"{CAPABILITY}, unless another program holds the number there"
    if holder == os.getpid():
        return (
            f"the number is taken by port id {holder}, probably a socket of this very program; "
            "close that or use another number"
        )
    return f"the number is taken by {name_of(holder)}; end that program or use another number"


def bind_refused(queue_num: int, error: int, own_port_id: int, sockfd: int) -> OSError:
    """The exception for a refused bind request; PermissionError where errno is EPERM."""
    if error == errno.EBUSY:
        why = f"the number is taken by port id {own_port_id}, which is this very socket"
    elif error == errno.EPERM:
        why = not_permitted(holder_of_queue(queue_num, sockfd))
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


def open_refused(group: int, error: int) -> OSError:
    """The exception for a refused log group; PermissionError where errno is EPERM."""
    if error == errno.EPERM:
        why = not_permitted(holder_of_group(group))
    elif error == errno.EINVAL:
        why = "the kernel lacks NFLOG: load it with modprobe nfnetlink_log"
    elif error == errno.EOPNOTSUPP:
        why = (
            "this kernel cannot tell connections (FLAG_CONNTRACK): load nf_conntrack_netlink, or "
            "open without this flag"
        )
    else:
        why = reason(error)
    return OSError(error, f"Failed to open log group {group}: {why}")


def open_unanswered(group: int) -> OSError:
    return OSError(
        errno.ENOBUFS,
        f"Failed to open log group {group}: the kernel's answer was lost; use a larger receive "
        "buffer (rcvbuf)",
    )


def reason(error: int) -> str:
    return CAPABILITY if error == errno.EPERM else os.strerror(error)


def flags_lacking(action: str, names: list[str]) -> OSError:
    """The exception for a request with flags that this kernel lacks."""
    needs = [f"{name}=True takes {FLAG_NEEDS.get(name, 'a later kernel')}" for name in names]
    return OSError(
        errno.EOPNOTSUPP,
        f"Failed to {action}: this kernel lacks {' and '.join(names)}; {', and '.join(needs)}. "
        "Nothing was changed",
    )


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

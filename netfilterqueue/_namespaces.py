"""Linux namespaces, as the sandbox of `netfilterqueue.testing` needs them.

`_sandbox` imports this file, and starts it as a program, by path and without the rest of the
package: only a process of one thread can join a user namespace, and starting must be fast.

    _namespaces.py hold {user|root} ROUTER HOST...  make the namespaces; an agent per control socket
    _namespaces.py exec PID COMMAND ARGUMENT...     join those of PID, and become another program

An agent keeps one network namespace alive. It says "ok PID", or "failed ERRNO WHAT" and ends. Then
it serves its control socket, one request a message:

    socket FAMILY TYPE PROTO  answered by "ok" and the new socket, or by "failed ERRNO WHAT"
    leave                     the agent ends
    (end of file)             the sandbox was closed, or its process died: the agent kills every
                              other process in its network namespace, and ends
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REC = 0x4000
MS_PRIVATE = 0x40000

MESSAGE_SIZE = 4096
DESCRIPTOR_SIZE = 4  # a C int
KILL_DEADLINE = 5.0  # seconds
ENDED = "/run/sandbox-ended"  # in the private /run

# Written before there is an interface: addresses are usable at once, and a node sends nothing
# unasked. No duplicate address detection, no router solicitation, multicast reports over at once.
SYSCTLS = (
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/router_solicitations", "0"),
    ("net/ipv6/conf/all/mldv2_unsolicited_report_interval", "0"),
    ("net/ipv6/conf/default/mldv2_unsolicited_report_interval", "0"),
)
FORWARDING = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")


def system_call(name: str, *arguments: int | bytes | None) -> None:
    """Call a function of the C library that returns -1 and sets errno when it fails."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) == -1:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)


def join(pid: int) -> None:
    """Move the calling process, of one thread, into the namespaces of another."""
    directory = os.getcwd()
    # The user namespace comes first: it gives the capabilities that the others ask for.
    for kind in ("user", "mnt", "net"):
        target = f"/proc/{pid}/ns/{kind}"
        # A process may not join the user namespace that it is in already.
        if os.path.samefile(target, f"/proc/self/ns/{kind}"):
            continue
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
        try:
            system_call("setns", descriptor, 0)
        finally:
            os.close(descriptor)
    os.chdir(directory)  # joining a mount namespace moves to its root


def write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="ascii")
    except OSError as error:
        # The kernel refuses the write, not the open, and then the error knows no path.
        raise OSError(error.errno, error.strerror, path) from None


def isolate(*, user_namespace: bool) -> None:
    """Make the namespaces that all nodes share, and the network namespace of the first."""
    if user_namespace:
        user, group = os.geteuid(), os.getegid()
        system_call("unshare", CLONE_NEWUSER)
        # Without privilege a group may be mapped only where setgroups is given up.
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"0 {user} 1")
        write("/proc/self/gid_map", f"0 {group} 1")
    # Only now: a network namespace asks for its root when it is made, to own files such as
    # /proc/net/netfilter/nfnetlink_queue, which are for nobody as long as no user is mapped.
    system_call("unshare", CLONE_NEWNS | CLONE_NEWNET)
    system_call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    # iptables takes a lock file in /run, where only the real root may write.
    system_call("mount", b"tmpfs", b"/run", b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=0755")


def configure(*, forwarding: bool) -> None:
    """Set the network namespace up: it may have inherited anything from the machine's."""
    for name, value in SYSCTLS:
        write(f"/proc/sys/{name}", value)
    for name in FORWARDING:
        write(f"/proc/sys/{name}", "1" if forwarding else "0")


def fail(control: socket.socket, error: OSError) -> None:
    what = error.filename or error.strerror
    control.send(f"failed {error.errno} {what}".encode())


def receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """The text and descriptors that an agent answered with; raises the error that it reports."""
    # Not recv_fds: before Python 3.12 it forgets its flags.
    message, ancillary, _, _ = control.recvmsg(
        MESSAGE_SIZE, socket.CMSG_LEN(DESCRIPTOR_SIZE), socket.MSG_CMSG_CLOEXEC
    )
    descriptors = [int.from_bytes(data, sys.byteorder) for _, _, data in ancillary]
    status, _, text = message.partition(b" ")
    if status == b"ok":
        return text, descriptors
    if status == b"failed":
        number, what = text.decode().split(" ", 1)
        raise OSError(int(number), os.strerror(int(number)), what)
    raise ConnectionResetError(errno.ECONNRESET, "The sandbox's agent has ended")


def shares_network(pid: int) -> bool:
    """Whether another process is in this network namespace. One that is ending is in none."""
    if pid == os.getpid():
        return False
    try:
        return os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net")
    except OSError:
        return False


def kill_others() -> None:
    """Kill every other process in this network namespace, also those that start meanwhile."""
    deadline = time.monotonic() + KILL_DEADLINE
    while time.monotonic() < deadline:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        others = [pid for pid in pids if shares_network(pid)]
        if not others:
            return
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def answer(control: socket.socket, request: bytes) -> None:
    _, family, kind, protocol = request.split()
    try:
        opened = socket.socket(int(family), int(kind), int(protocol))
    except OSError as error:
        fail(control, error)
        return
    with opened:
        socket.send_fds(control, [b"ok"], [opened.fileno()])


def serve(control: socket.socket) -> None:
    """Be an agent until the owner closes its end, or leaves."""
    # An owner that dies between request and answer shows as an error instead of end of file.
    with suppress(ConnectionError):
        control.send(f"ok {os.getpid()}".encode())
        while True:
            request = control.recv(MESSAGE_SIZE)
            if request == b"leave":
                return
            if not request:
                break
            answer(control, request)
    # A program that joins while the others are killed sees this, or is seen.
    Path(ENDED).touch()
    kill_others()


def hold(scope: str, descriptors: list[int]) -> None:
    """Be the agent of the router; its children are the agents of the hosts."""
    controls = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    router, hosts = controls[0], controls[1:]
    control = router
    try:
        isolate(user_namespace=scope == "user")
        for host in hosts:
            if os.fork() == 0:
                control = host
                system_call("unshare", CLONE_NEWNET)
                break
        # A copy of another agent's socket would hide from its owner that this agent has ended.
        for other in controls:
            if other is not control:
                other.close()
        configure(forwarding=control is router)
    except OSError as error:
        with suppress(ConnectionError):
            fail(control, error)
    else:
        serve(control)
    control.close()
    # Whoever waits for the router's agent knows that the hosts' agents have ended too.
    with suppress(ChildProcessError):
        while True:
            os.wait()


def execute(pid: int, command: list[str]) -> None:
    """Become another program in the namespaces of a process."""
    join(pid)
    if os.path.exists(ENDED):
        sys.exit("The sandbox has ended")
    # Python ignores these two; programs expect the default.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(sys.argv[2], [int(descriptor) for descriptor in sys.argv[3:]])
    else:
        execute(int(sys.argv[2]), sys.argv[3:])

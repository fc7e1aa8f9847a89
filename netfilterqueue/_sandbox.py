"""A private network of a router and two hosts, made without root. See `Sandbox`."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _namespaces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

COMMAND_TIMEOUT = 30.0  # seconds, for what ends by itself, such as iptables
AGENT_TIMEOUT = 10.0  # seconds

PROGRAM = (sys.executable, "-I", "-S", _namespaces.__file__)

# Debian keeps `ip` and `iptables` where users other than root do not look.
SYSTEM_DIRECTORIES = ("/usr/local/sbin", "/usr/sbin", "/sbin")

PACKAGES = {
    "ip": "iproute2 (Debian, Arch, Alpine) or iproute (Fedora)",
    "iptables": "iptables (Debian, Arch, Alpine) or iptables-nft (Fedora)",
    "ip6tables": "iptables (Debian, Arch, Alpine) or iptables-nft (Fedora)",
}

# What forbids user namespaces: the setting, the value that does, and one that does not.
SETTINGS = (
    ("user.max_user_namespaces", "0", "10000"),
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
)


class SandboxUnavailable(RuntimeError):
    """This machine forbids the sandbox or lacks a program for it. The text says what to do."""


class CommandFailed(subprocess.CalledProcessError):
    """A command ended with an error. The text shows what it wrote to standard error."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.stderr or ''}".rstrip()


class End(NamedTuple):
    """One end of the cable between the router and a host."""

    interface: str
    mac: str
    ipv4: str
    ipv6: str


class Link(NamedTuple):
    router: End
    host: End


# The addresses are those set aside for documentation (RFC 5737, RFC 3849): nobody has them.
LINKS = {
    "left": Link(
        router=End("left", "02:00:00:00:01:01", "192.0.2.1", "2001:db8:1::1"),
        host=End("eth0", "02:00:00:00:01:02", "192.0.2.2", "2001:db8:1::2"),
    ),
    "right": Link(
        router=End("right", "02:00:00:00:02:01", "198.51.100.1", "2001:db8:2::1"),
        host=End("eth0", "02:00:00:00:02:02", "198.51.100.2", "2001:db8:2::2"),
    ),
}


def plug(own: End, peer: End) -> Iterator[str]:
    """The `ip` commands that put one end of a cable into use."""
    device = f"dev {own.interface}"
    yield f"link set {device} up"
    yield f"address add {own.ipv4}/24 {device}"
    yield f"address add {own.ipv6}/64 {device} nodad"
    # Known neighbours need not be asked for: the only packets are those that a test makes.
    for address in (peer.ipv4, peer.ipv6):
        yield f"neighbour add {address} lladdr {peer.mac} nud permanent {device}"


def search_path(path: str) -> str:
    directories = path.split(os.pathsep)
    return os.pathsep.join(
        [*directories, *(name for name in SYSTEM_DIRECTORIES if name not in directories)]
    )


def explain(error: OSError, *, user_namespace: bool) -> str:
    """Why the namespaces could not be made, and what to do about it."""
    text = f"No sandbox here: {error}."
    if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOSYS):
        return f"{text} The kernel needs user namespaces, network namespaces and IPv6."
    if not user_namespace:
        return f"{text} user_namespace=False needs the real root; without it, root is not needed."
    for setting, forbidding, allowing in SETTINGS:
        path = Path("/proc/sys", *setting.split("."))
        if path.exists() and path.read_text(encoding="ascii").strip() == forbidding:
            return (
                f"{text} {setting} is {forbidding}, which forbids user namespaces;"
                f" as root: sysctl -w {setting}={allowing}"
            )
    if error.errno == errno.ENOSPC:
        return (
            f"{text} Namespaces are nested too deep, or one of the limits"
            " user.max_{user,mnt,net}_namespaces is reached; as root, raise it with sysctl -w."
        )
    return (
        f"{text} If this is a container, run it with --privileged, or with --security-opt"
        " seccomp=unconfined, apparmor=unconfined and systempaths=unconfined;"
        " in a chroot, namespaces are forbidden."
    )


class Rule:
    """An iptables rule of a `Node`; it ends by `remove()`, a `with` block, or with the sandbox."""

    def __init__(self, node: Node, command: Sequence[str], rule: Sequence[str]) -> None:
        self._node = node
        self._command = command
        self._rule = rule
        self._node.run([*command, "-A", *rule])
        self._present = True

    def __enter__(self) -> Rule:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Rule {' '.join((*self._command, '-A', *self._rule))!r} of {self._node.name}>"

    def remove(self) -> None:
        """Delete the rule. Again, or after the sandbox has been closed, it does nothing."""
        if self._present and not self._node.closed:
            self._node.run([*self._command, "-D", *self._rule])
        self._present = False


class Node:
    """The router or a host of a `Sandbox`: a network namespace, and what can be done in it.

    name: "router", "left" or "right".
    pid: a process that holds the namespace: `/proc/<pid>/ns/net` names it.
    interfaces: the names of its network interfaces: one in a host; in the router one to each host.
    mac, ipv4, ipv6: the addresses of the first of them. All hosts reach each address of the router.
    """

    def __init__(self, name: str, pid: int, control: socket.socket, ends: Sequence[End]) -> None:
        self.name = name
        self.pid = pid
        self.interfaces = tuple(end.interface for end in ends)
        _, self.mac, self.ipv4, self.ipv6 = ends[0]
        self._control = control
        self._lock = threading.Lock()  # a request and its answer stay together
        self._inside = False  # the calling process is in this namespace
        self._processes: list[subprocess.Popen[Any]] = []

    def __repr__(self) -> str:
        return f"<{self.name} of a Sandbox, {'closed' if self.closed else f'pid {self.pid}'}>"

    @property
    def closed(self) -> bool:
        return self._control.fileno() == -1

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float | None = COMMAND_TIMEOUT,
        check: bool = True,
        capture_output: bool = True,
        text: bool = True,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a command to its end, as `subprocess.run` does, with other defaults.

        Output is captured as text, time is limited (seconds), and a command that ends with an error
        raises `CommandFailed`: a `subprocess.CalledProcessError` whose text shows standard error.
        """
        command, options = self._prepare(argv, options)
        try:
            result = subprocess.run(
                command,
                timeout=timeout,
                check=False,
                capture_output=capture_output,
                text=text,
                **options,
            )
        except subprocess.TimeoutExpired as error:
            error.cmd = argv
            raise
        result.args = argv
        if check and result.returncode != 0:
            raise CommandFailed(result.returncode, argv, result.stdout, result.stderr)
        return result

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program, as `subprocess.Popen` does. It is killed when the sandbox is closed."""
        command, options = self._prepare(argv, options)
        process: subprocess.Popen[Any] = subprocess.Popen(command, **options)
        process.args = argv
        self._processes.append(process)
        return process

    def socket(self, family: int, type: int, proto: int = 0) -> socket.socket:
        """Open a socket in this namespace. It keeps working there, whatever process uses it."""
        self._require_open()
        with self._lock:
            self._control.send(f"socket {int(family)} {int(type)} {proto}".encode())
            _, descriptors = _namespaces.receive(self._control)
        return socket.socket(fileno=descriptors[0])

    def rule(
        self,
        chain: str,
        *match: object,
        queue: int | None = None,
        bypass: bool = False,
        ipv6: bool = False,
        table: str = "filter",
    ) -> Rule:
        """Append a rule of iptables, or ip6tables: `rule("INPUT", "-p", "icmp", queue=1)`.

        queue: the number of the queue (`-j NFQUEUE`); without it, `match` has a target of its own.
        bypass: packets pass while nobody has bound the queue, instead of being dropped.
        """
        rule = [chain, *map(str, match)]
        if queue is not None:
            rule += ["-j", "NFQUEUE", "--queue-num", str(queue)]
            rule += ["--queue-bypass"] if bypass else []
        return Rule(self, ["ip6tables" if ipv6 else "iptables", "-w", "-t", table], rule)

    def _prepare(
        self, argv: Sequence[str], options: dict[str, Any]
    ) -> tuple[list[str], dict[str, Any]]:
        """The command that becomes `argv` in this namespace, and the options to start it with."""
        self._require_open()
        environment = options.get("env")
        if environment is None:
            environment = {**os.environ, "PATH": search_path(os.environ.get("PATH", os.defpath))}
        file: str | None = argv[0]
        if not os.path.dirname(argv[0]):
            file = shutil.which(argv[0], path=environment.get("PATH"))
        if file is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), argv[0])
        command = [file, *argv[1:]]
        if not self._inside:
            command = [*PROGRAM, "exec", str(self.pid), *command]
        return command, {**options, "env": environment}

    def _require_open(self) -> None:
        if self.closed:
            raise RuntimeError("The sandbox is closed")

    def _close(self) -> None:
        """End the programs and the agent of this node."""
        if self.closed:
            return
        for process in self._processes:
            process.kill()
            process.wait()
        with self._control, suppress(ConnectionError):
            if self._inside:
                # The calling process, and what it started by itself, live on.
                self._control.send(b"leave")
            # Copies of this socket in forked processes shall not delay the end.
            self._control.shutdown(socket.SHUT_RDWR)


class Sandbox:
    """A private network of a router and two hosts, in namespaces of its own, made without root.

        with Sandbox() as sandbox:
            left, right = sandbox.hosts
            with sandbox.router.rule("FORWARD", "-p", "icmp", queue=1):
                filter = sandbox.router.popen([sys.executable, "my_filter.py"])
                left.run(["ping", "-c", "1", right.ipv4])

    `router` forwards IPv4 and IPv6 between the `hosts`. Only the network is separate, and `/run`,
    which is empty; other files are those of the calling process. No packet is sent but those of the
    programs inside: addresses need no detection, and neighbours are known. `close()`, or the end of
    the `with` block, ends all programs inside, and with them rules and namespaces; so does the end
    of the calling process.

    A user namespace gives the rights that are needed: inside, the user is root. The real root can
    do without, by `user_namespace=False`, and then may, for instance, exceed `net.core.rmem_max`.

    `SandboxUnavailable` is raised where namespaces are forbidden, or `ip` or `iptables` is missing.
    """

    def __init__(self, *, user_namespace: bool = True) -> None:
        for program, packages in PACKAGES.items():
            if shutil.which(program, path=search_path(os.environ.get("PATH", os.defpath))) is None:
                raise SandboxUnavailable(f"No sandbox here: install {program}: package {packages}.")
        self._user_namespace = user_namespace
        self._start()
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Sandbox, {'closed' if self.router.closed else f'router pid {self.router.pid}'}>"

    @property
    def nodes(self) -> tuple[Node, ...]:
        return (self.router, *self.hosts)

    def enter_router(self) -> None:
        """Move the calling process into the router: a `NetfilterQueue()` in it then binds there.

        There is no way back. A process that has threads already gets `SandboxUnavailable`.
        """
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:
            raise SandboxUnavailable(
                f"This process has {threads} threads; enter the sandbox before starting any."
            )
        _namespaces.join(self.router.pid)
        self.router._inside = True

    def close(self) -> None:
        """End the programs, the rules and the namespaces. Idempotent."""
        for node in self.nodes:
            node._close()
        self._agent.wait(AGENT_TIMEOUT)

    def _start(self) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(3)]
        theirs = [their.fileno() for _, their in pairs]
        self._agent = subprocess.Popen(
            [*PROGRAM, "hold", "user" if self._user_namespace else "root", *map(str, theirs)],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the calling process to handle
        )
        for _, their in pairs:
            their.close()
        ends = [
            [link.router for link in LINKS.values()],
            *([link.host] for link in LINKS.values()),
        ]
        nodes = []
        try:
            for name, (control, _), own in zip(("router", *LINKS), pairs, ends):
                control.settimeout(AGENT_TIMEOUT)
                reply, _ = _namespaces.receive(control)
                nodes.append(Node(name, int(reply), control, own))
        except OSError as error:
            for control, _ in pairs:
                control.close()
            self._agent.wait(AGENT_TIMEOUT)
            text = explain(error, user_namespace=self._user_namespace)
            raise SandboxUnavailable(text) from error
        self.router, self.hosts = nodes[0], (nodes[1], nodes[2])

    def _connect(self) -> None:
        """Join the hosts to the router."""
        commands = {self.router: ["link set lo up"]}
        for host, link in zip(self.hosts, LINKS.values()):
            commands[self.router] += [
                (
                    f"link add {link.router.interface} address {link.router.mac} type veth"
                    f" peer name {link.host.interface} address {link.host.mac} netns {host.pid}"
                ),
                *plug(link.router, link.host),
            ]
            commands[host] = [
                "link set lo up",
                *plug(link.host, link.router),
                f"route add default via {link.router.ipv4}",
                f"route add default via {link.router.ipv6}",
            ]
        try:
            for node, batch in commands.items():
                node.run(["ip", "-batch", "-"], input="\n".join(batch))
        except CommandFailed as error:
            raise SandboxUnavailable(
                f"No sandbox here: {error}\nIt needs the `ip` of iproute2, and veth in the kernel."
            ) from error

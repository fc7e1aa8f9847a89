"""Fixtures for tests on the real kernel, without root.

The pytest process itself is the router of a `netfilterqueue.testing.Sandbox`: it enters at the very
start, as only a process of one thread can. Hence a plain `NetfilterQueue()` in a test binds in the
router, and packets come over loopback or from the two hosts. Where namespaces are forbidden, the
tests that need them skip with the reason; with NETFILTERQUEUE_REQUIRE_NAMESPACES=1 the whole run
fails instead.

With `--real-root` the sandbox has no user namespace: the process keeps the rights of the real root,
and the tests marked `real_root` run too.

The tests marked `stock_kernel` need what not every kernel has. `ci/vm` runs them with
`--stock-kernel`, and there none of them may be skipped. Elsewhere they are deselected, and counted
as such; but with `only=False` they run, and are skipped where the kernel lacks what they need.

After each test nothing may be left: no queue bound, no rule, and in a debug build no object alive.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from messages import Wire
from netfilterqueue import NetfilterQueue, _channel, nflog
from netfilterqueue._sandbox import search_path
from netfilterqueue.testing import Sandbox, SandboxUnavailable
from support import (
    CHAINS,
    LEFT_MAC,
    LOG_PREFIX,
    RECEIVE_BUFFER,
    RIGHT_MAC,
    Program,
    QueuedUdp,
    SocketReader,
    Traffic,
    bound_queues,
    is_up,
    open_groups,
    wait_until,
)
from teams import start_team

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from netfilterqueue import Packet
    from netfilterqueue.testing import Node, Rule
    from support import Runner, UdpFlow
    from teams import Team

SANDBOX = pytest.StashKey[Sandbox]()
FORBIDDEN = pytest.StashKey[str]()
FAILED = pytest.StashKey[bool]()

queue_numbers = itertools.count(1)
group_numbers = itertools.count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-root",
        action="store_true",
        help="run as the real root, in a network namespace without a user namespace",
    )
    parser.addoption(
        "--stock-kernel",
        action="store_true",
        help="run the tests that need a distribution's kernel, too (in ci/vm)",
    )


def pytest_configure(config: pytest.Config) -> None:
    real_root = config.getoption("--real-root")
    if real_root and os.geteuid() != 0:
        raise pytest.UsageError("--real-root needs root")
    try:
        sandbox = config.stash[SANDBOX] = Sandbox(user_namespace=not real_root)
        sandbox.enter_router()
    except SandboxUnavailable as error:
        if os.environ.get("NETFILTERQUEUE_REQUIRE_NAMESPACES") == "1":
            raise pytest.UsageError(str(error)) from error
        config.stash[FORBIDDEN] = str(error)
    # Tests call `iptables` by its name, as users' programs do.
    os.environ["PATH"] = search_path(os.environ.get("PATH", os.defpath))


def pytest_unconfigure(config: pytest.Config) -> None:
    if SANDBOX in config.stash:
        config.stash[SANDBOX].close()


def pytest_report_header(config: pytest.Config) -> str:
    kind = "of the real root" if config.getoption("--real-root") else "in a user namespace"
    return f"network: {config.stash.get(FORBIDDEN, f'a sandbox {kind}')}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--real-root"):
        for item in items:
            if item.get_closest_marker("real_root"):
                item.add_marker(pytest.mark.skip(reason="needs --real-root"))
    if not config.getoption("--stock-kernel"):
        elsewhere = [item for item in items if runs_there_only(item)]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


def runs_there_only(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("stock_kernel")
    return marker is not None and bool(marker.kwargs.get("only", True))


def pytest_collection_finish() -> None:
    # What is there by now stays. The collections around each test need not go through it again.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    item.stash[FAILED] = call.excinfo is not None
    report = yield
    here = item.config.getoption("--stock-kernel") and item.get_closest_marker("stock_kernel")
    if here and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped where it must run: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a queue bound, a rule in the router or, if counted, an object."""
    before = objects_alive()
    yield
    # pytest would keep the test's arguments, a queue among them, for longer.
    request.node.funcargs.clear()
    in_router = "router" in request.fixturenames and FORBIDDEN not in request.config.stash
    if in_router and bound_queues():
        gc.collect()
    rules_left = flush_rules() if in_router else []
    if request.node.stash[FAILED]:
        # What its traceback names lives as long as the report.
        return
    assert not (in_router and bound_queues()), "a queue was left bound"
    assert not rules_left, "a rule was left"
    assert not {name: n for name, n in objects_alive().items() if n > before[name]}, "left alive"


def objects_alive() -> dict[str, int]:
    """The counts of a debug build, else nothing."""
    if _channel.alive() is None:
        return {}
    gc.collect()
    return dict(_channel.alive())


def flush_rules() -> list[str]:
    """Delete all rules of the router; return what there was."""
    found = []
    for program in ("iptables", "ip6tables"):
        saved = subprocess.run([f"{program}-save"], capture_output=True, text=True, check=True)
        table = ""
        for line in saved.stdout.splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith("-A"):
                found.append(f"{program} -t {table} {line}")
                subprocess.run([program, "-w", "-t", table, "-F"], check=True)
    return found


@pytest.fixture(scope="session")
def sandbox(pytestconfig: pytest.Config) -> Sandbox:
    """The sandbox whose router this process is. Skips the test where there is none."""
    if FORBIDDEN in pytestconfig.stash:
        pytest.skip(pytestconfig.stash[FORBIDDEN])
    return pytestconfig.stash[SANDBOX]


@pytest.fixture(scope="session")
def router(sandbox: Sandbox) -> Node:
    """The router: this process. Tests that need the kernel ask for it, or for a fixture below."""
    return sandbox.router


@pytest.fixture(scope="session")
def hosts(router: Node, sandbox: Sandbox) -> tuple[Node, Node]:
    """The left and the right host, which reach each other by way of the router only."""
    return sandbox.hosts


@pytest.fixture
def bridged_hosts(router: Node, hosts: tuple[Node, Node]) -> Iterator[tuple[str, str]]:
    """A second network of the hosts, bridged by the router, and their addresses in it."""
    addresses, macs = ("203.0.113.1", "203.0.113.2"), (LEFT_MAC.hex(":"), RIGHT_MAC.hex(":"))
    commands = ["link add bridge0 type bridge", "link set bridge0 up"]
    for number, host in enumerate(hosts):
        commands += [
            f"link add port{number} type veth peer name bridged netns {host.pid}",
            f"link set port{number} master bridge0 up",
        ]
    router.run(["ip", "-batch", "-"], input="\n".join(commands))
    for own, host in enumerate(hosts):
        commands = [
            f"link set bridged address {macs[own]} up",
            f"address add {addresses[own]}/24 dev bridged",
            f"neighbour add {addresses[1 - own]} lladdr {macs[1 - own]} nud permanent dev bridged",
        ]
        host.run(["ip", "-batch", "-"], input="\n".join(commands))
    # Until then, what is sent is lost.
    ends = [(router, "port0"), (router, "port1"), *((host, "bridged") for host in hosts)]
    wait_until(lambda: all(is_up(node, name) for node, name in ends), what="bridge in use")
    yield addresses
    for name in ("port0", "port1", "bridge0"):
        router.run(["ip", "link", "delete", name])


@pytest.fixture
def queue_num(router: Node) -> int:
    """A queue number that no other test uses."""
    return next(queue_numbers)


@pytest.fixture
def rules(router: Node) -> Iterator[Callable[..., Rule]]:
    """Append rules to the router, as `Node.rule` does; they are removed after the test."""
    added: list[Rule] = []

    def rule(chain: str, *match: object, **options: Any) -> Rule:
        added.append(router.rule(chain, *match, **options))
        return added[-1]

    yield rule
    for one in reversed(added):
        one.remove()


@pytest.fixture
def count(router: Node, rules: Callable[..., Rule]) -> Callable[..., Callable[[], int]]:
    """Append a rule that does nothing, and return a function that tells how many packets met it."""

    def add(chain: str, *match: object, table: str = "filter") -> Callable[[], int]:
        comment = f"counter {next(numbers)}"
        rules(chain, *match, "-m", "comment", "--comment", comment, table=table)

        def counted() -> int:
            listed = router.run(["iptables", "-t", table, "-v", "-n", "-x", "-L", chain]).stdout
            [line] = [line for line in listed.splitlines() if comment in line]
            return int(line.split()[0])

        return counted

    numbers = iter(range(100))
    return add


@pytest.fixture
def nft(router: Node) -> Iterator[Callable[..., None]]:
    """Add a table of nftables to the router, its chains given as text; it goes after the test.

    `nft("chain c { type filter hook input priority 0; udp dport 9 queue to 1; }", family="inet")`
    """
    tables: list[str] = []

    def add(chains: str, *, family: str = "ip") -> None:
        table = f"{family} test{len(tables)}"
        router.run(["nft", "-f", "-"], input=f"table {table} {{\n{chains}\n}}\n")
        tables.append(table)

    yield add
    for table in reversed(tables):
        router.run(["nft", "delete", "table", *table.split()])


@pytest.fixture
def traffic(router: Node, sandbox: Sandbox) -> Iterator[Traffic]:
    """Make `udp`, `ping` and `tcp` traffic: `traffic.udp("forward", ipv6=True).send(b"hello")`."""
    made = Traffic(sandbox)
    yield made
    made.close()


@pytest.fixture
def queue(router: Node) -> Iterator[NetfilterQueue]:
    """A queue to be bound; it is closed after the test."""
    with NetfilterQueue() as opened:
        yield opened


@pytest.fixture
def queued(queue_num: int, rules: Callable[..., Rule], traffic: Traffic) -> Callable[..., UdpFlow]:
    """Make UDP traffic that goes to `queue_num`, or to the queue `number`.

    `queued("forward", ipv6=True).send(b"x")` is a datagram from host to host.
    """

    def flow(
        path: str = "loopback",
        *,
        ipv6: bool = False,
        number: int = queue_num,
        chain: str | None = None,
        table: str = "filter",
    ) -> UdpFlow:
        made = traffic.udp(path, ipv6=ipv6)
        match = ("-p", "udp", "--dport", made.port)
        rules(chain or CHAINS[path], *match, queue=number, ipv6=ipv6, table=table)
        return made

    return flow


@pytest.fixture
def flow(queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]) -> UdpFlow:
    """Traffic to `queue`, which is bound without a callback: to be pulled."""
    queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
    return queued()


@pytest.fixture
def group(router: Node) -> Iterator[int]:
    """The number of a log group that no other test uses."""
    number = next(group_numbers)
    yield number
    assert number not in open_groups(), "the group was left open"


@pytest.fixture
def logged(group: int, rules: Callable[..., Rule], traffic: Traffic) -> Callable[..., UdpFlow]:
    """Make UDP traffic that goes to `group`: `logged("forward", chain="POSTROUTING")`."""

    def flow(
        path: str = "loopback",
        *options: object,
        chain: str = "INPUT",
        table: str = "filter",
        ipv6: bool = False,
        prefix: str = LOG_PREFIX,
    ) -> UdpFlow:
        made = traffic.udp(path, ipv6=ipv6)
        target = ["-j", "NFLOG", "--nflog-group", group, *options]
        if prefix:
            target += ["--nflog-prefix", prefix]
        rules(chain, "-p", "udp", "--dport", made.port, *target, table=table, ipv6=ipv6)
        return made

    return flow


@pytest.fixture
def log(group: int) -> Iterator[nflog.Nflog]:
    """The log group `group`, open as it is by default."""
    with nflog.open(group) as opened:
        yield opened


@pytest.fixture
def queued_udp(
    queue: NetfilterQueue, queue_num: int, queued: Callable[..., UdpFlow]
) -> Callable[..., QueuedUdp]:
    """Bind `queue` to where UDP traffic goes: `queued_udp("forward", Packet.accept, max_len=8)`."""

    def start(
        path: str = "loopback",
        callback: Callable[[Packet], Any] = lambda packet: None,
        *,
        ipv6: bool = False,
        chain: str | None = None,
        table: str = "filter",
        **options: Any,
    ) -> QueuedUdp:
        packets = []

        def keep(packet: Packet) -> Any:
            packets.append(packet)
            return callback(packet)

        flow = queued(path, ipv6=ipv6, chain=chain, table=table)
        queue.bind(queue_num, keep, sock_len=RECEIVE_BUFFER, **options)
        return QueuedUdp(flow, queue, packets)

    return start


@pytest.fixture(params=["run", "run_socket"])
def runner(request: pytest.FixtureRequest, queue: NetfilterQueue) -> Iterator[Runner]:
    """What `run_until` runs: `queue`, by its `run`, and by its `run_socket`."""
    if request.param == "run":
        yield queue
    else:
        with contextlib.closing(SocketReader(queue)) as reader:
            yield reader


@pytest.fixture
def run_program(router: Node) -> Iterator[Callable[..., Program]]:
    """Start Python programs, text given, in the router or another node; killed after the test.

    `run_program(source, *arguments, node=…, python=…, env=…)` returns a `Program`.
    """
    programs: list[Program] = []

    def start(source: str, *arguments: str, node: Node = router, **options: Any) -> Program:
        programs.append(Program(node, source, *arguments, **options))
        return programs[-1]

    yield start
    for program in programs:
        program.close()


@pytest.fixture
def team(
    run_program: Callable[..., Program], queue_num: int, tmp_path: Path
) -> Callable[..., Team]:
    """Serve queues in a program: `team(2, restart=False)`."""
    return functools.partial(start_team, run_program, queue_num, tmp_path)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """Where verdicts arrive that are sent without a kernel."""
    with contextlib.closing(Wire()) as made:
        yield made

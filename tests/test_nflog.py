"""Log groups on the kernel: what is told of packets on their way, and how it is handed out."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import re
import select
import socket
import time
from typing import TYPE_CHECKING, Any

# trio registers with hypothesis, which looks for its caller by the collector: not after conftest.py
# has frozen what there is.
import hypothesis  # noqa: F401
import pytest
import trio

import netfilterqueue.nflog as nflogr
from netfilterqueue import Hook
from netfilterqueue.nflog import Nflog, NflogData
from netfilterqueue.vlan import Vlan
from support import (
    LOG_PREFIX,
    TIMEOUT,
    alarm,
    in_thread,
    open_groups,
    wait_until,
    wait_until_blocked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.testing import Node, Rule
    from support import Program, Traffic, UdpFlow


def sent(data: NflogData) -> bytes:
    """What the datagram of a `UdpFlow` carries."""
    assert data.payload is not None
    return data.payload[28:] if data.payload[0] >> 4 == 4 else data.payload[48:]


# How many messages to log for the test that counts them.
MESSAGES = int(os.environ.get("NETFILTERQUEUE_TEST_MESSAGES", "100000"))

# What the kernel tells

CLONE_NEWNET = 0x40000000  # <linux/sched.h>

HOOKS = {
    Hook.PREROUTING: ("forward", "PREROUTING", "raw"),
    Hook.INPUT: ("input", "INPUT", "filter"),
    Hook.FORWARD: ("forward", "FORWARD", "filter"),
    Hook.OUTPUT: ("output", "OUTPUT", "filter"),
    Hook.POSTROUTING: ("output", "POSTROUTING", "mangle"),
}


@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_every_attribute_on_every_hook(
    hook: Hook, ipv6: bool, group: int, logged: Callable[..., UdpFlow]
) -> None:
    path, chain, table = HOOKS[hook]
    flags = nflogr.FLAG_SEQ | nflogr.FLAG_SEQ_GLOBAL
    flow = logged(path, chain=chain, table=table, ipv6=ipv6)
    with nflogr.open(group, flags=flags) as log:
        before = time.time()
        flow.sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 77)
        flow.send(b"hello")
        data = log.next()
    assert data is not None
    entering = hook in (Hook.PREROUTING, Hook.INPUT, Hook.FORWARD)
    leaving = hook in (Hook.FORWARD, Hook.OUTPUT, Hook.POSTROUTING)
    assert data.hook == hook
    assert data.proto == (0x86DD if ipv6 else 0x0800)
    assert sent(data) == b"hello"
    assert data.prefix == LOG_PREFIX
    assert data.seq == 0
    assert data.seq_global is not None
    assert (data.indev is None) != entering
    assert (data.outdev is None) != leaving
    assert {data.indev, data.outdev} <= {None, *(name for _, name in socket.if_nameindex())}
    assert data.indev != data.outdev
    assert (data.physindev, data.physoutdev, data.vlan, data.conntrack) == (None,) * 4
    if entering:
        # The mark was the sender's, in another namespace.
        assert data.nfmark == 0
        assert data.timestamp is not None
        assert data.timestamp_us is not None
        assert before - 1 < data.timestamp < time.time() + 1
        assert data.timestamp_us == pytest.approx(data.timestamp * 1e6, abs=1)
        assert data.hwtype == 1
        assert data.hwaddr is not None
        assert data.hwhdr is not None
        assert len(data.hwhdr) == 14
        assert data.hwhdr[6:12] == data.hwaddr
        assert (data.uid, data.gid) == (None, None)
    else:
        assert data.nfmark == 77
        assert (data.timestamp, data.timestamp_us) == (None, None)
        assert data.hwaddr is None
        assert (data.uid, data.gid) == (os.geteuid(), os.getegid())
    assert len(dict(data)) == 20


def test_message_without_prefix(log: Nflog, logged: Callable[..., UdpFlow]) -> None:
    logged(prefix="").send(b"x")
    data = log.next()
    assert data is not None
    assert not data.prefix


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"range": 30}, 30),
        ({"range": 0}, 128),
        ({"copymode": nflogr.COPY_PACKET}, 128),
        ({"copymode": nflogr.COPY_META}, None),
        ({"copymode": nflogr.COPY_NONE}, None),
    ],
)
def test_how_much_is_copied(
    options: dict[str, int], length: int | None, group: int, logged: Callable[..., UdpFlow]
) -> None:
    flow = logged()
    with nflogr.open(group, **options) as log:
        flow.send(bytes(100))
        data = log.next()
    assert data is not None
    assert data.prefix == LOG_PREFIX
    assert (None if data.payload is None else len(data.payload)) == length


@pytest.mark.parametrize("nlbuf", [0, 4096, 131072])
def test_largest_packets_are_whole(nlbuf: int, group: int, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    with nflogr.open(group, nlbuf=nlbuf, qthresh=3, timeout=0.05) as log:
        payloads = [b"a" * 65000, b"small", b"b" * 65000, b"c" * 3000]
        flow.send(*payloads)
        assert [sent(data) for data in itertools.islice(log, 4)] == payloads
        assert log.lost == 0


def test_buffer_is_read_to_its_end(group: int, logged: Callable[..., UdpFlow]) -> None:
    """The kernel also fills what its allocator gave beyond `nlbuf`."""
    flow = logged()
    with nflogr.open(group, nlbuf=131072, qthresh=10000, timeout=10) as log:
        flood(flow, 400, bytes(1000))
        came_together = log.queue()
        assert came_together * 1000 > 131072
        messages = list(itertools.islice(log, came_together))
        assert [data.seq for data in messages] == [*range(came_together)]
        assert {len(sent(data)) for data in messages} == {1000}


def test_netdev_family(group: int, nft: Callable[..., None], traffic: Traffic) -> None:
    interface = next(name for _, name in socket.if_nameindex() if name != "lo")
    hook = f'type filter hook ingress device "{interface}" priority 0'
    nft(f'chain c {{ {hook}; log group {group} prefix "ingress"; }}', family="netdev")
    flow = traffic.udp("forward")
    with nflogr.open(group) as log:
        flow.send(b"hello")
        data = next(data for data in log if data.proto == 0x0800)
    assert (data.prefix, data.indev, data.outdev) == ("ingress", interface, None)
    assert sent(data) == b"hello"


@pytest.fixture
def bridge(router: Node, hosts: tuple[Node, Node]) -> Iterator[socket.socket]:
    """A link of the left host that ends at a port of a bridge: a socket to send frames with."""
    commands = (
        "link add log_bridge type bridge",
        "link set log_bridge up",
        f"link add log_port type veth peer name log_end netns {hosts[0].pid}",
        "link set log_port master log_bridge up",
    )
    for command in commands:
        router.run(["ip", *command.split()])
    hosts[0].run(["ip", "link", "set", "log_end", "up"])
    wait_until(lambda: "forwarding" in port_state(router), what="bridge in use")
    with hosts[0].socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind(("log_end", 0))
        yield sender
    for name in ("log_port", "log_bridge"):
        router.run(["ip", "link", "delete", name])


def port_state(router: Node) -> str:
    return str(router.run(["ip", "-details", "link", "show", "log_port"]).stdout)


@pytest.mark.parametrize("tagged", [False, True], ids=["plain", "VLAN"])
def test_bridge_family(
    tagged: bool, group: int, nft: Callable[..., None], bridge: socket.socket
) -> None:
    destination, source = b"\xff" * 6, b"\2\0\0\0\0\x21"
    tag = b"\x81\0\x60\x05" if tagged else b""
    hook = "type filter hook prerouting priority 0"
    nft(f'chain c {{ {hook}; log group {group} prefix "bridged"; }}', family="bridge")
    with nflogr.open(group) as log:
        bridge.send(destination + source + tag + b"\x08\0" + b"\x45" + bytes(45))
        data = next(data for data in log if data.hwaddr == source)
    assert (data.prefix, data.proto, data.hook) == ("bridged", 0x0800, Hook.PREROUTING)
    assert (data.indev, data.physindev) == ("log_bridge", "log_port")
    assert data.vlan == (Vlan(0x8100, 0x6005) if tagged else None)
    assert data.payload is not None
    assert data.payload[0] == 0x45
    assert data.hwhdr is not None
    assert data.hwhdr[:12] == destination + source


def test_interfaces_are_those_of_the_namespace_of_the_handle(
    log: Nflog, logged: Callable[..., UdpFlow]
) -> None:
    """Whatever thread asks."""
    flood(logged("forward", chain="FORWARD"), 1)
    data = next(iter(log))

    def names_elsewhere() -> tuple[str | None, str | None]:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
        assert [name for _, name in socket.if_nameindex()] == ["lo"]
        return data.indev, data.outdev

    expected = data.indev, data.outdev
    assert None not in expected
    assert in_thread(names_elsewhere).result(TIMEOUT) == expected


# A kernel without the glue between conntrack and logs refuses the flag.
@pytest.mark.stock_kernel
def test_connection(group: int, rules: Callable[..., Rule], logged: Callable[..., UdpFlow]) -> None:
    # The kernel tracks connections only where a rule asks for it.
    rules("INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "ACCEPT")
    flow = logged()
    with nflogr.open(group, flags=nflogr.FLAG_CONNTRACK) as log:
        flow.send(b"1", b"2")
        connections = [data.conntrack for data in itertools.islice(log, 2)]
    assert None not in connections
    assert len({connection.id for connection in connections if connection}) == 1
    (original,) = {connection.original for connection in connections if connection}
    assert (original.protocol, original.destination) == (socket.IPPROTO_UDP, "127.0.0.1")
    assert original.destination_port == flow.port


# Many messages


def flood(flow: UdpFlow, count: int, payload: bytes = b"x") -> None:
    for _ in range(count):
        flow.sender.send(payload)


# Not a thread: two that wait for each other's GIL would take minutes.
SENDER = """
import socket, sys
port, count = map(int, sys.argv[1:])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    sender.connect(("127.0.0.1", port))
    for _ in range(count):
        sender.send(b"x")
"""


def packets_of(group: int, router: Node) -> int:
    """What the rule for this group has counted."""
    rules = router.run(["iptables-save", "-c"]).stdout
    (counted,) = re.findall(rf"\[(\d+):\d+\] .*--nflog-group {group}\b", rules)
    return int(counted)


def drain(log: Nflog) -> int:
    return sum(1 for _ in iter(lambda: log.next(wait=False), None))


@pytest.mark.parametrize("threshold", [1, 100])
@pytest.mark.parametrize("rcvbuf", [212992, 4096], ids=["usual buffer", "tiny buffer"])
def test_every_message_is_handed_out_or_counted_as_lost(
    threshold: int,
    rcvbuf: int,
    group: int,
    router: Node,
    logged: Callable[..., UdpFlow],
    run_program: Callable[..., Program],
) -> None:
    flow = logged("loopback", "--nflog-threshold", threshold)
    received = 0
    with nflogr.open(
        group, qthresh=100, timeout=0.05, rcvbuf=rcvbuf, enobufs=nflogr.ENOBUFS_DISABLE
    ) as log:
        sender = run_program(SENDER, str(flow.port), str(MESSAGES))
        in_thread(sender.wait, 60).add_done_callback(lambda _: log.stop())
        for _ in log:
            received += 1

        def all_accounted_for() -> bool:
            nonlocal received
            received += drain(log)
            # What is missing at the end shows with the next message.
            flow.send(b"one more")
            wait_until(lambda: open_groups()[group][1] == "0", what="handed to the socket")
            received += drain(log)
            return packets_of(group, router) == received + (log.lost or 0)

        wait_until(all_accounted_for)
    assert received >= MESSAGES / 1000


def test_messages_come_together(group: int, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    with nflogr.open(group, qthresh=10, timeout=10) as log:
        flood(flow, 9)
        assert log.next(wait=False) is None
        flood(flow, 1)
        assert log.queue() == 10
        assert log.queued == 10
        assert [data.seq for data in itertools.islice(log, 10)] == [*range(10)]
        assert log.queued == 0


def test_timeout_ends_the_waiting_for_more(group: int, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    with nflogr.open(group, qthresh=1000, timeout=0.05) as log:
        flood(flow, 3)
        start = time.monotonic()
        assert log.queue() == 3
        assert time.monotonic() - start < TIMEOUT


def test_messages_outlive_their_read(log: Nflog, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    kept = []
    payloads = [b"%d" % number for number in range(300)]
    for payload in payloads:
        flow.send(payload)
        kept.append(log.next())
    assert [sent(data) for data in kept if data] == payloads
    log.close()
    assert [sent(data) for data in kept if data] == payloads


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_messages_that_are_kept_are_not_used_again(
    every: int, group: int, logged: Callable[..., UdpFlow]
) -> None:
    flow = logged()
    payloads = [b"%d" % number for number in range(300)]
    with nflogr.open(group, qthresh=15, timeout=0.05) as log:
        flow.send(*payloads)
        kept = [data for data in itertools.islice(log, 300) if not (data.seq or 0) % every]
        assert [sent(data) for data in kept] == payloads[::every]
        assert len({id(data) for data in kept}) == len(kept)


# Overruns


@pytest.mark.parametrize("enobufs", [nflogr.ENOBUFS_RAISE, nflogr.ENOBUFS_HANDLE])
def test_overrun(enobufs: int, group: int, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    with nflogr.open(group, rcvbuf=4096, enobufs=enobufs) as log:
        flood(flow, 100)
        if enobufs == nflogr.ENOBUFS_RAISE:
            with pytest.raises(nflogr.NflogDroppedError, match="ENOBUFS"):
                log.queue()
        received = [data.seq for data in iter(lambda: log.next(wait=False), None) if data]
        # What was read before is not lost with it.
        assert received == [*range(len(received))]
        assert 0 < len(received) < 100
        assert log.drops == 1
        flow.send(b"last")
        last = log.next()
        assert last is not None
        assert last.seq == 100
        assert log.lost == 100 - len(received)
        with pytest.raises(TypeError, match="0 only"):
            log.drops = 5
        log.drops = 0
        assert log.drops == 0


def test_disabled_overruns_are_told_by_lost_only(
    group: int, logged: Callable[..., UdpFlow]
) -> None:
    flow = logged()
    with nflogr.open(group, rcvbuf=4096, enobufs=nflogr.ENOBUFS_DISABLE) as log:
        flood(flow, 100)
        received = log.queue()
        flow.send(b"last")
        messages = list(itertools.islice(log, received + 1))
        assert messages[-1].seq == 100
        assert log.drops == 0
        assert log.lost == 100 - received


def test_nothing_is_known_of_losses_without_numbers(
    group: int, logged: Callable[..., UdpFlow]
) -> None:
    flow = logged()
    with nflogr.open(group, flags=0) as log:
        flow.send(b"x")
        data = log.next()
        assert data is not None
        assert (data.seq, log.lost) == (None, None)


# Handing out


def test_loop_counts(log: Nflog, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    flood(flow, 5)
    seen: list[NflogData] = []
    assert log.loop(seen.append, 3) is None  # type: ignore[func-returns-value]
    assert [data.seq for data in seen] == [0, 1, 2]
    log.loop(seen.append, count=0)
    assert len(seen) == 3
    log.loop(seen.append, 2)
    assert [data.seq for data in seen] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("fn", "text"), [(None, "callable"), (asyncio.sleep, "coroutine")])
def test_loop_takes_a_function(log: Nflog, fn: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"fn .*{text}"):
        log.loop(fn)


def test_what_a_callback_raises_leaves_the_loop_and_nothing_is_lost(
    group: int, logged: Callable[..., UdpFlow]
) -> None:
    flow = logged()
    seen = []

    def callback(data: NflogData) -> None:
        seen.append(data.seq)
        if data.seq == 2:
            raise LookupError("mine")

    with nflogr.open(group, qthresh=5, timeout=10) as log:
        flood(flow, 5)
        with pytest.raises(LookupError, match="mine"):
            log.loop(callback)
        assert select.select([log], [], [], 0)[0]
        log.loop(callback, 2)
    assert seen == [0, 1, 2, 3, 4]


def test_event_loops_see_messages_that_were_read_but_not_handed_out(
    group: int, logged: Callable[..., UdpFlow]
) -> None:
    flow = logged()
    with nflogr.open(group, qthresh=4, timeout=10) as log:
        flood(flow, 4)
        for number in range(4):
            assert select.select([log.fileno()], [], [], TIMEOUT)[0]
            data = log.next(wait=False)
            assert data is not None
            assert data.seq == number
        while select.select([log.fileno()], [], [], 0)[0]:
            assert log.next(wait=False) is None


def test_waiting_lets_other_threads_run(log: Nflog, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    waiting = in_thread(log.next)
    wait_until_blocked(log.fileno())
    flow.send(b"hello")
    assert sent(waiting.result(TIMEOUT)) == b"hello"


def first(log: Nflog) -> NflogData | None:
    return next(iter(log), None)


WAITS: dict[str, Callable[[Nflog], Any]] = {
    "queue": lambda log: log.queue(),
    "next": lambda log: log.next(),
    "loop": lambda log: log.loop(print),
    "for": first,
    "async for": lambda log: asyncio.run(first_of(log)),
    "async for on trio": lambda log: trio.run(first_of, log),
}


async def first_of(log: Nflog) -> NflogData | None:
    async for data in log:
        return data
    return None


@pytest.mark.parametrize("wait", [*WAITS])
def test_stop_ends_what_waits(wait: str, log: Nflog) -> None:
    if not wait.startswith("async"):
        waiting = in_thread(WAITS[wait], log)
        wait_until_blocked(log.fileno())
        log.stop()
        assert not waiting.result(TIMEOUT)
    # With nothing under way, the next one ends at once, and the one after it waits again.
    log.stop()
    assert not WAITS[wait](log)
    with alarm(0.05, lambda *_: log.stop()):
        assert not WAITS[wait](log)


def test_stop_ends_every_loop(log: Nflog) -> None:
    loops = [in_thread(log.loop, print), in_thread(first, log)]
    wait_until_blocked(log.fileno(), threads=2)
    log.stop()
    for loop in loops:
        loop.result(TIMEOUT)


def test_stop_from_the_callback(log: Nflog, logged: Callable[..., UdpFlow]) -> None:
    flood(logged(), 5)
    seen = []

    def callback(data: NflogData) -> None:
        seen.append(data)
        log.stop()

    log.loop(callback)
    assert len(seen) == 1
    for data in log:
        seen.append(data)
        log.stop()
    assert len(seen) == 2


@pytest.mark.parametrize("wait", ["queue", "next", "loop", "for"])
def test_signal_handlers_run_while_waiting(wait: str, log: Nflog) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), alarm(0.05, interrupt):
        WAITS[wait](log)


@pytest.mark.parametrize("run", [asyncio.run, lambda main: trio.run(lambda: main)])
def test_async_for(run: Callable[[Any], None], log: Nflog, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    seen = []

    async def main() -> None:
        flow.send(b"0")
        async for data in log:
            seen.append(sent(data))
            if len(seen) == 5:
                log.stop()
            else:
                flow.send(b"%d" % len(seen))

    run(main())
    assert seen == [b"0", b"1", b"2", b"3", b"4"]


def test_tasks_share_a_handle(group: int, logged: Callable[..., UdpFlow]) -> None:
    flow = logged()
    seen = []

    async def task(log: Nflog) -> None:
        async for data in log:
            seen.append(data.seq)
            if len(seen) == 20:
                log.stop()
            await asyncio.sleep(0)

    async def main() -> None:
        with nflogr.open(group, qthresh=10, timeout=10) as log:
            tasks = [asyncio.ensure_future(task(log)) for _ in range(3)]
            await asyncio.sleep(0.01)
            flood(flow, 10)
            await asyncio.sleep(0.01)
            flood(flow, 10)
            await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)

    asyncio.run(main())
    assert {*seen} == {*range(20)}
    assert len(seen) == 20


def test_close_ends_async_for(log: Nflog) -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(0.05, log.close)
        assert await asyncio.wait_for(first_of(log), TIMEOUT) is None

    asyncio.run(main())


# Closing


def test_closed_handle_hands_out_what_it_has_read(
    group: int, logged: Callable[..., UdpFlow]
) -> None:
    log = nflogr.open(group, qthresh=5, timeout=10)
    flood(logged(), 5)
    assert log.queue() == 5
    log.close()
    log.close()
    assert (log.getfd(), log.getgroup(), log.rcvbuf, log.queued) == (None, group, None, 5)
    data = log.next()
    assert data is not None
    assert (data.seq, data.indev) == (0, "lo")
    assert [data.seq for data in itertools.islice(log, 2)] == [1, 2]
    seen: list[NflogData] = []
    log.loop(seen.append)
    assert [data.seq for data in seen] == [3, 4]
    assert (log.queued, log.queue(), log.next(wait=False), [*log]) == (0, 0, None, [])
    with pytest.raises(nflogr.NflogClosedError, match="closed"):
        log.next()
    with pytest.raises(ValueError, match="closed"):
        log.fileno()
    with pytest.raises(ValueError, match="closed"):
        log.rcvbuf = 5000
    assert issubclass(nflogr.NflogClosedError, nflogr.NflogError)


def test_messages_that_wait_in_the_kernel_come_with_the_closing(
    group: int, logged: Callable[..., UdpFlow]
) -> None:
    with nflogr.open(group, qthresh=100, timeout=100) as log:
        flood(logged(), 3)
        assert log.queue(wait=False) == 0
    assert [data.seq for data in log] == [0, 1, 2]


@pytest.mark.parametrize("wait", ["queue", "loop", "for"])
def test_close_from_another_thread_ends_waiting(wait: str, log: Nflog) -> None:
    waiting = in_thread(WAITS[wait], log)
    wait_until_blocked(log.fileno())
    log.close()
    assert not waiting.result(TIMEOUT)


def test_close_from_another_thread_ends_next(log: Nflog) -> None:
    waiting = in_thread(log.next)
    wait_until_blocked(log.fileno())
    log.close()
    with pytest.raises(nflogr.NflogClosedError):
        waiting.result(TIMEOUT)


def test_dropped_handle_gives_the_group_up(group: int) -> None:
    log = nflogr.open(group)
    assert group in open_groups()
    del log
    assert group not in open_groups()


def test_forked_child_leaves_the_group_to_its_parent(
    group: int, logged: Callable[..., UdpFlow]
) -> None:
    flow = logged()
    with nflogr.open(group) as log:
        flood(flow, 2)
        assert log.queue() == 2
        pid = os.fork()
        if not pid:
            # What the parent has read is not the child's.
            status = log.queued
            log.close()
            os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert group in open_groups()
        flow.send(b"last")
        assert [data.seq for data in itertools.islice(log, 3)] == [0, 1, 2]

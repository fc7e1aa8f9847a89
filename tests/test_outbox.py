"""When a verdict is sent, in what order, and what becomes of it when that fails.

Hand-made reads, and a socket pair in the kernel's place; where a queue's own life matters, a queue.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from netfilterqueue._handmade import packets_from

from messages import PACKET, Wire, message, simple_packets, verdicts_in
from netfilterqueue import Verdict
from support import (
    TIMEOUT,
    in_thread,
    numbered,
    run_until,
    wait_until,
    wait_until_blocked,
    without_net_admin,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from netfilterqueue import NetfilterQueue, Packet
    from support import Program, QueuedUdp, UdpFlow

TESTS = str(Path(__file__).parent)
NEVER = 60.0  # seconds; no test waits so long for the helper thread
SHORTLY = 0.004
NO_DESCRIPTOR = 1 << 20
LOST = (errno.ECONNREFUSED, errno.ENOTCONN)


def read(wire: Wire, *ids: int, delay: float = NEVER, extra: Sequence[bytes] = ()) -> list[Packet]:
    """Packets of one read, which may bring more messages."""
    packets: list[Packet]
    packets, _ = packets_from([*simple_packets(*ids), *extra], fd=wire.fd, verdict_delay=delay)
    return packets


def sent(wire: Wire) -> list[list[int]]:
    """The packets decided by each send that is there already."""
    return [[verdict.id for verdict in verdicts_in(send)] for send in wire.arrived()]


def verdicts(packets: Sequence[Packet]) -> list[Verdict | None]:
    return [packet.verdict for packet in packets]


def helpers() -> list[Path]:
    """The helper threads of this process."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (task / "comm").read_text(encoding="ascii") == "nfqueue-verdict\n":
                found.append(task)
    return found


def times_woken(helper: Path) -> int:
    for line in (helper / "status").read_text(encoding="ascii").splitlines():
        if line.startswith("voluntary_ctxt_switches"):
            return int(line.split()[1])
    raise AssertionError("the kernel does not count context switches")


def wait_until_parked(helper: Path) -> None:
    """Return when the helper has not woken for what is many ticks with a delay of `SHORTLY`."""

    def asleep() -> bool:
        before = times_woken(helper)
        time.sleep(10 * SHORTLY)
        return times_woken(helper) == before

    wait_until(asleep)


@contextlib.contextmanager
def hasty_threads() -> Iterator[None]:
    """Let Python change from thread to thread as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(params=[2**31 - 6, 2**32 - 6], ids=["half of the numbers used", "all numbers used"])
def many_sends_ago(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outboxes of this test have sent so often that the next few numbers are a limit of 32 bits:
    of sequence numbers, those of verdicts are the upper half."""
    monkeypatch.setattr("netfilterqueue._outbox.first_flight", request.param)


# When


def test_only_packet_of_a_read_is_sent_at_once(wire: Wire) -> None:
    [packet] = read(wire, 1)
    packet.accept()
    assert sent(wire) == [[1]]


@pytest.mark.parametrize("count", [2, 3, 32, 100])
def test_last_of_a_read_sends_all_at_once(wire: Wire, count: int) -> None:
    *others, last = read(wire, *range(count))
    for packet in others:
        packet.accept()
    assert sent(wire) == []
    last.drop()
    assert sent(wire) == [list(range(count))]


def test_without_a_delay_each_is_sent_at_once(wire: Wire) -> None:
    for packet in read(wire, 1, 2, 3, delay=0):
        packet.accept()
        assert sent(wire) == [[packet.id]]
    assert not helpers()


def test_verdict_that_waits_counts_as_given(wire: Wire) -> None:
    first, last = read(wire, 1, 2)
    first.repeat()
    assert verdicts([first, last]) == [Verdict.REPEAT, None]
    with pytest.raises(RuntimeError, match="Verdict already given for this packet"):
        first.accept()
    last.accept()
    assert [verdict.verdict for verdict in wire.verdicts()] == [Verdict.REPEAT, Verdict.ACCEPT]


@pytest.mark.parametrize(
    "no_packet", [b"", message(b"", 1), message(b"", 17), message(b"", PACKET)], ids=repr
)
def test_message_that_is_no_packet_holds_nothing_back(wire: Wire, no_packet: bytes) -> None:
    [packet] = read(wire, 1, extra=[no_packet])
    packet.accept()
    assert sent(wire) == [[1]]


def test_packet_collected_undecided_holds_nothing_back(wire: Wire) -> None:
    first, second, third = read(wire, 1, 2, 3)
    first.accept()
    del second
    assert sent(wire) == []
    third.accept()
    assert sent(wire) == [[1, 3]]


def test_helper_sends_what_waited_for_a_packet_that_was_collected(wire: Wire) -> None:
    first, second = read(wire, 1, 2, delay=SHORTLY)
    first.accept()
    del second
    assert wire.ids() == [1]


def test_helper_sends_each_verdict_within_the_delay(wire: Wire) -> None:
    delay = 0.02
    *others, last = read(wire, *range(20), delay=delay)
    for packet in others:
        given = time.monotonic()
        packet.accept()
        assert wire.ids() == [packet.id]
        # A quarter, for a clock and a thread that are late; the limit is what a busy machine needs.
        assert delay / 4 < time.monotonic() - given < 1
    assert last.verdict is None


def test_helper_sends_while_python_is_held_up(wire: Wire) -> None:
    first, last = read(wire, 1, 2, delay=SHORTLY)
    first.accept()
    # A call that keeps the GIL.
    ctypes.PyDLL(None).usleep(300_000)
    assert sent(wire) == [[1]]
    assert last.verdict is None


def test_helper_sleeps_without_a_timer_and_is_woken(wire: Wire) -> None:
    *others, last = read(wire, *range(4), delay=SHORTLY)
    [helper] = helpers()
    for packet in others:
        wait_until_parked(helper)
        packet.accept()
        assert wire.ids() == [packet.id]
    assert helpers() == [helper]
    assert last.verdict is None


# Helper threads


def test_read_of_one_packet_needs_no_helper(wire: Wire) -> None:
    packets = [read(wire, n) for n in range(3)]
    assert not helpers()
    del packets


@pytest.mark.parametrize("state", ["parked", "awake", "pending"])
def test_helper_ends_with_what_it_serves(wire: Wire, state: str) -> None:
    packets = read(wire, 1, 2, delay=NEVER if state == "pending" else SHORTLY)
    [helper] = helpers()
    if state == "parked":
        wait_until_parked(helper)
    if state == "pending":
        packets[0].accept()
    del packets
    gc.collect()
    # A thread that was joined is listed for a moment still.
    wait_until(lambda: not helpers())


def test_queue_starts_its_helper_when_a_read_has_several_packets(
    queue: NetfilterQueue, queued_udp: Callable[..., QueuedUdp]
) -> None:
    udp = queued_udp(callback=lambda packet: packet.accept())
    for _ in range(3):
        udp.deliver_one()
    assert not helpers()
    udp.deliver(b"one", b"two", b"three")
    assert len(helpers()) == 1
    queue.close()
    wait_until(lambda: not helpers())


# In what order


def test_verdicts_given_while_a_send_blocks_keep_their_order(wire: Wire) -> None:
    packets = read(wire, 1, 2, 3, 4, delay=SHORTLY)
    in_the_way = wire.clog()
    packets[0].accept()
    wait_until_blocked(wire.fd)
    # The helper is in the system call. Neither giving a verdict nor asking for one waits for it.
    in_thread(packets[1].accept).result(TIMEOUT)
    in_thread(packets[2].accept).result(TIMEOUT)
    assert verdicts(packets) == [Verdict.ACCEPT] * 3 + [None]
    last = in_thread(packets[3].accept)
    wait_until(lambda: packets[3].verdict is Verdict.ACCEPT)
    assert [wire.receive() for _ in range(in_the_way)] == [b""] * in_the_way
    assert [wire.ids(), wire.ids()] == [[1], [2, 3, 4]]
    last.result(TIMEOUT)


def test_each_threads_verdicts_keep_their_order(wire: Wire) -> None:
    count, threads = 1000, 4
    packets = read(wire, *range(count), delay=0.0002)
    arrived = in_thread(receive_ids, wire, count)

    def decide(mine: list[Packet]) -> None:
        for packet in mine:
            packet.accept()

    with hasty_threads():
        shares = [packets[n::threads] for n in range(threads)]
        for decided in [in_thread(decide, share) for share in shares]:
            decided.result(TIMEOUT)
    ids = arrived.result(TIMEOUT)
    assert sorted(ids) == list(range(count))
    for n in range(threads):
        assert [one for one in ids if one % threads == n] == list(range(n, count, threads))


def test_of_many_threads_one_decides_each_packet(wire: Wire) -> None:
    count, threads = 10_000, 4
    packets: list[Packet]
    # One datagram, as so many slots for the largest packet take much memory.
    padded = [one + bytes(-len(one) % 4) for one in simple_packets(*range(count))]
    packets, _ = packets_from([b"".join(padded)], fd=wire.fd)
    arrived = in_thread(receive_ids, wire, count)

    def decide(order: list[Packet]) -> int:
        return sum(map(decided_first, order))

    def decided_first(packet: Packet) -> bool:
        try:
            packet.accept()
        except RuntimeError as error:
            if "Verdict already given" not in str(error):
                raise
            return False
        return True

    with hasty_threads():
        orders = [random.Random(n).sample(packets, count) for n in range(threads)]
        deciding = [in_thread(decide, order) for order in orders]
        successes = [decided.result(TIMEOUT) for decided in deciding]
    assert sum(successes) == count
    assert sorted(arrived.result(TIMEOUT)) == list(range(count))
    assert not wire.readable


def receive_ids(wire: Wire, count: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < count:
        ids += wire.ids()
    return ids


# Sends that fail


@contextlib.contextmanager
def failed_send(*numbers: int) -> Iterator[None]:
    with pytest.raises(OSError, match="still undecided") as caught:
        yield
    assert caught.value.errno in numbers


def test_send_that_fails_raises_and_leaves_the_packet_undecided(wire: Wire) -> None:
    [packet] = read(wire, 1)
    packet.set_mark(7)
    wire.cut()
    for decide in (packet.accept, packet.drop):
        with failed_send(*LOST):
            decide()
        assert packet.verdict is None
    wire.mend()
    packet.repeat()
    assert packet.verdict is Verdict.REPEAT
    assert [(one.verdict, one.mark) for one in wire.verdicts()] == [(Verdict.REPEAT, 7)]


def test_closed_descriptor_is_an_error_with_its_errno() -> None:
    packets: list[Packet]
    packets, _ = packets_from(simple_packets(1), fd=NO_DESCRIPTOR)
    with failed_send(errno.EBADF):
        packets[0].accept()
    assert packets[0].verdict is None


def test_packet_whose_payload_was_too_long_to_send_can_go_without(wire: Wire) -> None:
    [packet] = read(wire, 1)
    wire.shrink()
    packet.set_payload(bytes(60_000))
    with failed_send(errno.EMSGSIZE):
        packet.accept()
    packet.set_payload(None)
    packet.accept()
    assert sent(wire) == [[1]]


def test_send_that_fails_concerns_all_that_were_in_it(wire: Wire) -> None:
    packets = read(wire, 1, 2, 3)
    packets[0].accept()
    packets[1].drop()
    wire.cut()
    with failed_send(*LOST):
        packets[2].accept()
    assert verdicts(packets) == [None, None, None]
    wire.mend()
    for packet in reversed(packets):
        packet.accept()
    assert sorted(n for ids in sent(wire) for n in ids) == [1, 2, 3]
    assert verdicts(packets) == [Verdict.ACCEPT] * 3


def test_send_that_fails_does_not_concern_those_before_and_after(wire: Wire) -> None:
    before, between, after, undecided = read(wire, 1, 2, 3, 4, delay=SHORTLY)
    before.accept()
    assert wire.ids() == [1]
    wire.cut()
    between.accept()
    wait_until(lambda: between.verdict is None)
    wire.mend()
    with failed_send(*LOST):
        after.accept()
    after.accept()
    assert wire.ids() == [3]
    assert verdicts([before, between, after, undecided]) == [
        Verdict.ACCEPT,
        None,
        Verdict.ACCEPT,
        None,
    ]
    for packet in (before, after):
        with pytest.raises(RuntimeError, match="Verdict already given"):
            packet.drop()


def test_full_send_that_fails_leaves_the_packet_at_hand_undecided_too(wire: Wire) -> None:
    packets = read(wire, *range(1500))
    wire.cut()
    given = 0
    with failed_send(*LOST):
        for packet in packets:
            packet.accept()
            given += 1
    assert 0 < given < 1499
    assert verdicts(packets) == [None] * 1500
    wire.mend()
    arrived = []
    for packet in packets:
        packet.accept()
        arrived += [n for ids in sent(wire) for n in ids]
    assert arrived == list(range(1500))


def test_error_of_the_helper_comes_with_the_next_verdict_once(wire: Wire) -> None:
    first, second, third = read(wire, 1, 2, 3, delay=SHORTLY)
    wire.cut()
    first.accept()
    wait_until(lambda: first.verdict is None)
    wire.mend()
    with failed_send(*LOST):
        second.accept()
    assert second.verdict is None
    for packet in (second, first, third):
        packet.accept()
    assert sorted(receive_ids(wire, 3)) == [1, 2, 3]


def test_many_sends_that_fail_are_all_told_apart(wire: Wire) -> None:
    """Those that failed are remembered as runs of numbers: every second send is the worst case."""
    fail_every_second(wire)


@pytest.mark.usefixtures("many_sends_ago")
def test_sends_that_fail_are_told_apart_where_their_numbers_start_over(wire: Wire) -> None:
    fail_every_second(wire)


def fail_every_second(wire: Wire) -> None:
    packets = read(wire, *range(41), delay=0)
    for packet in packets:
        if packet.id % 2:
            packet.accept()
            continue
        wire.cut()
        with failed_send(*LOST):
            packet.accept()
        wire.mend()
    assert verdicts(packets) == [Verdict.ACCEPT if n % 2 else None for n in range(41)]


@pytest.mark.usefixtures("many_sends_ago")
def test_verdicts_that_the_kernel_refuses_are_told_apart_where_their_numbers_start_over(
    queued_udp: Callable[..., QueuedUdp],
) -> None:
    udp = queued_udp(verdict_delay=0)
    packets = udp.deliver(*numbered(20))
    for packet in packets:
        with without_net_admin() if packet.id % 2 else contextlib.nullcontext():
            packet.accept()
    with pytest.raises(PermissionError):
        run_until(udp.queue, lambda: False)
    assert verdicts(packets) == [None if packet.id % 2 else Verdict.ACCEPT for packet in packets]


def test_packet_is_asked_for_its_verdict_while_the_helper_fails(wire: Wire) -> None:
    """What failed is remembered by the helper and looked up by others: the build with
    AddressSanitizer sees whether they mind each other."""
    *packets, _ = read(wire, *range(301), delay=0.00002)
    for packet in packets:
        if packet.id % 2:
            packet.accept()
            assert wire.ids() == [packet.id]
            continue
        wire.cut()
        packet.accept()
        wait_until_undecided(packet)
        wire.mend()
        with failed_send(*LOST):
            packet.accept()
    assert verdicts(packets) == [Verdict.ACCEPT if n % 2 else None for n in range(300)]


def wait_until_undecided(packet: Packet) -> None:
    """Without a pause, in contrast to `wait_until`."""
    deadline = time.monotonic() + TIMEOUT
    while packet.verdict is not None:
        assert time.monotonic() < deadline


# Fork, and the end


# The programs leave sockets open, as programs do.
UNSTRICT = ("-X", "faulthandler", "-u")

FORK = """
    import os, sys
    sys.path.insert(0, sys.argv[1])
    from messages import Wire, simple_packets
    from netfilterqueue._handmade import packets_from

    def read(wire, delay, *ids):
        return packets_from(simple_packets(*ids), fd=wire.fd, verdict_delay=delay)[0]

    def use_helper(name):
        wire = Wire()
        first, last = read(wire, 0.004, 1, 2)
        first.accept()
        assert wire.ids() == [1], name

    wire = Wire()
    packets = read(wire, 60, 1, 2, 3, 4)
    packets[0].accept()
    child = os.fork()
    if not child:
        packets[1].accept()
        use_helper("child")
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    packets[2].accept()
    use_helper("parent")
    print([wire.ids() for _ in range(3)], wire.readable)
"""


def test_forked_child_starts_with_nothing_pending_and_both_go_on(
    run_program: Callable[..., Program],
) -> None:
    assert run_program(FORK, TESTS, python=UNSTRICT).run() == "[[1], [2], [3]] False\n"


EXIT = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from messages import Wire, simple_packets
    from netfilterqueue._handmade import packets_from

    wire = Wire()
    delay = float(sys.argv[2])
    packets, _ = packets_from(simple_packets(*range(64)), fd=wire.fd, verdict_delay=delay)
    for packet in packets[:-1]:
        packet.accept()
    print("the end")
"""


@pytest.mark.parametrize("delay", ["0.0001", "60"])
def test_interpreter_ends_with_verdicts_pending(
    run_program: Callable[..., Program], delay: str
) -> None:
    assert run_program(EXIT, TESTS, delay, python=UNSTRICT).run() == "the end\n"


EXIT_WITH_QUEUE = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from netfilterqueue import NetfilterQueue
    from support import wait_until_queued

    packets = []
    queue = NetfilterQueue()
    queue.bind(int(sys.argv[2]), packets.append, verdict_delay=60)
    print("bound")
    wait_until_queued(int(sys.argv[2]), 2)
    queue.run(block=False)
    packets[0].accept()
"""


def test_queue_sends_what_is_pending_when_the_interpreter_ends(
    run_program: Callable[..., Program], queued: Callable[..., UdpFlow], queue_num: int
) -> None:
    flow = queued()
    program = run_program(EXIT_WITH_QUEUE, TESTS, str(queue_num))
    program.wait_for("bound")
    flow.send(b"accepted", b"undecided")
    program.run()
    assert flow.receive() == b"accepted"
    assert flow.arrived() == []

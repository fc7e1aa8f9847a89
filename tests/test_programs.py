"""Programs as people have written them for NetfilterQueue 1.x, unchanged, on real packets.

All of them run with NetfilterQueue 1.1.0 too.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from support import START_TIMEOUT, Program, bound_queues, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue.testing import Node, Rule
    from support import Traffic, UdpFlow

# The receive buffer is smaller than asked for where the real root is not at hand.
PYTHON = ("-u", "-X", "faulthandler", "-W", "error", "-W", "ignore:Socket rcvbuf limit")


@pytest.fixture
def start(run_program: Callable[..., Program]) -> Callable[..., Program]:
    """Start a program and wait until it has bound its queues."""

    def started(source: str, *arguments: str, bound: set[int]) -> Program:
        program = run_program(source, *arguments, python=PYTHON)
        wait_until(
            lambda: bound <= {*bound_queues()} or program.process.poll() is not None,
            START_TIMEOUT,
            f"queues {bound} bound",
        )
        if program.process.poll() is not None:
            pytest.fail(f"the program ended: {program.run()}")
        return program

    return started


def interrupt(program: Program) -> list[str]:
    """Press Ctrl-C, which the program expects, and return the lines of its output."""
    program.interrupt()
    lines = program.run().splitlines()
    assert not bound_queues()
    return lines


PRINT_AND_ACCEPT = """
from netfilterqueue import NetfilterQueue

def print_it(pkt):
    print(pkt)
    pkt.accept()

nfqueue = NetfilterQueue()
nfqueue.bind(1, print_it)
try:
    nfqueue.run()
except KeyboardInterrupt:
    print("interrupted")

nfqueue.unbind()
"""


def test_run_until_keyboard_interrupt_then_unbind(
    start: Callable[..., Program], queued: Callable[..., UdpFlow]
) -> None:
    program = start(PRINT_AND_ACCEPT, bound={1})
    flow = queued(number=1)
    flow.send(b"hello", b"hello again")
    assert flow.receive_all(2) == [b"hello", b"hello again"]
    assert interrupt(program) == ["UDP packet, 33 bytes", "UDP packet, 39 bytes", "interrupted"]


EDIT_WITH_SCAPY = """
from netfilterqueue import NetfilterQueue
from scapy.all import IP, UDP, Raw

def edit(pkt):
    p = IP(pkt.get_payload())
    if p.haslayer(Raw):
        p[Raw].load = p[Raw].load.replace(b"hello", b"good bye")
        p[IP].ttl = 3
        del p[IP].len
        del p[IP].chksum
        del p[UDP].len
        del p[UDP].chksum
        pkt.set_payload(bytes(p))
    print(p.summary())
    pkt.accept()

nfqueue = NetfilterQueue()
nfqueue.bind(2, edit)
try:
    nfqueue.run()
except KeyboardInterrupt:
    pass
nfqueue.unbind()
"""


def test_edit_with_scapy(
    start: Callable[..., Program], queued: Callable[..., UdpFlow], hosts: tuple[Node, Node]
) -> None:
    program = start(EDIT_WITH_SCAPY, bound={2})
    flow = queued("forward", number=2)
    flow.send(b"hello, world", b"as it was")
    assert flow.receive_all(2) == [b"good bye, world", b"as it was"]
    lines = interrupt(program)
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"IP / UDP {hosts[0].ipv4}:")
        assert line.endswith(f" > {hosts[1].ipv4}:{flow.port} / Raw")


DROP_BY_MODULE = """
import netfilterqueue

def process_packet(packet):
    print("dropping", packet)
    packet.drop()

queue = netfilterqueue.NetfilterQueue()
queue.bind(0, process_packet)
queue.run()
"""


def test_module_imported_as_such_and_interrupt_not_caught(
    start: Callable[..., Program], queued: Callable[..., UdpFlow], rules: Callable[..., Rule]
) -> None:
    program = start(DROP_BY_MODULE, bound={0})
    flow = queued("forward", number=0)
    flow.send(b"hello")
    program.wait_for("dropping UDP packet, 33 bytes")
    program.interrupt()
    assert program.wait() == -signal.SIGINT
    assert program.output.endswith("KeyboardInterrupt\n")
    assert flow.arrived() == []


RULES_BY_SUBPROCESS = """
import subprocess
import sys
from netfilterqueue import NetfilterQueue

rule = ["INPUT", "-p", "udp", "--dport", sys.argv[1], "-j", "NFQUEUE", "--queue-num", "4"]

def callback(pkt):
    print(pkt)
    pkt.accept()

subprocess.check_call(["iptables", "-I"] + rule)
nfqueue = NetfilterQueue()
nfqueue.bind(4, callback, 100)
try:
    print("ready")
    nfqueue.run()
except KeyboardInterrupt:
    print("cleaning up")
finally:
    nfqueue.unbind()
    subprocess.check_call(["iptables", "-D"] + rule)
"""


def test_iptables_by_subprocess_before_and_after(
    start: Callable[..., Program], traffic: Traffic, router: Node
) -> None:
    flow = traffic.udp("input")
    program = start(RULES_BY_SUBPROCESS, str(flow.port), bound={4})
    assert "--queue-num 4" in router.run(["iptables-save"]).stdout
    program.wait_for("ready")
    flow.send(b"hello")
    assert flow.receive() == b"hello"
    assert interrupt(program) == ["ready", "UDP packet, 33 bytes", "cleaning up"]
    assert "--queue-num 4" not in router.run(["iptables-save"]).stdout


RUN_SOCKET = """
import socket
from netfilterqueue import NetfilterQueue

def print_it(pkt):
    print(pkt)
    pkt.accept()

nfqueue = NetfilterQueue()
nfqueue.bind(5, print_it)
s = socket.fromfd(nfqueue.get_fd(), socket.AF_UNIX, socket.SOCK_STREAM)
try:
    nfqueue.run_socket(s)
except KeyboardInterrupt:
    print("interrupted")

s.close()
nfqueue.unbind()
"""


def test_run_socket_on_the_queues_descriptor(
    start: Callable[..., Program], queued: Callable[..., UdpFlow]
) -> None:
    program = start(RUN_SOCKET, bound={5})
    flow = queued(number=5)
    flow.send(b"hello", b"hello again")
    assert flow.receive_all(2) == [b"hello", b"hello again"]
    assert interrupt(program) == ["UDP packet, 33 bytes", "UDP packet, 39 bytes", "interrupted"]


RUN_SOCKET_WITH_GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()

import socket
import gevent
from netfilterqueue import NetfilterQueue

def print_it(pkt):
    print(pkt)
    pkt.accept()

def tick():
    ticks = 0
    while True:
        gevent.sleep(0.01)
        ticks += 1
        print("tick", ticks)

nfqueue = NetfilterQueue()
nfqueue.bind(5, print_it)
gevent.spawn(tick)
s = socket.fromfd(nfqueue.get_fd(), socket.AF_NETLINK, socket.SOCK_RAW)
try:
    nfqueue.run_socket(s)
except KeyboardInterrupt:
    print("interrupted")

s.close()
nfqueue.unbind()
"""


def test_run_socket_with_gevent_lets_other_greenlets_run(
    start: Callable[..., Program], queued: Callable[..., UdpFlow]
) -> None:
    program = start(RUN_SOCKET_WITH_GEVENT, bound={5})
    flow = queued(number=5)
    for goal in (5, 10):
        program.wait_for(f"tick {goal}\n")
        flow.send(b"hello")
        assert flow.receive() == b"hello"
    lines = interrupt(program)
    assert lines[-1] == "interrupted"
    assert lines.count("UDP packet, 33 bytes") == 2


STOP_FLAG = """
import socket
import threading
import time
from netfilterqueue import NetfilterQueue

class Filter(threading.Thread):
    def __init__(self):
        threading.Thread.__init__(self)
        self.stop = False
        self.timeouts = 0

    def callback(self, pkt):
        print(pkt)
        pkt.accept()

    def run(self):
        nfqueue = NetfilterQueue()
        nfqueue.bind(6, self.callback)
        s = socket.fromfd(nfqueue.get_fd(), socket.AF_UNIX, socket.SOCK_STREAM)
        s.settimeout(0.02)
        while not self.stop:
            try:
                nfqueue.run_socket(s)
            except socket.timeout:
                self.timeouts += 1
                if self.timeouts == 3:
                    print("nothing for a while")
        s.close()
        nfqueue.unbind()

thread = Filter()
thread.start()
try:
    while True:
        time.sleep(1)
except KeyboardInterrupt:
    thread.stop = True
    thread.join()
    print("joined")
"""


def test_run_socket_with_a_timeout_and_a_stop_flag_in_a_thread(
    start: Callable[..., Program], queued: Callable[..., UdpFlow]
) -> None:
    program = start(STOP_FLAG, bound={6})
    program.wait_for("nothing for a while")
    flow = queued(number=6)
    flow.send(b"hello")
    assert flow.receive() == b"hello"
    assert interrupt(program) == ["nothing for a while", "UDP packet, 33 bytes", "joined"]


THREAD_PER_QUEUE = """
import threading
import time
from netfilterqueue import NetfilterQueue

class Worker:
    def __init__(self, number):
        self.number = number
        self.count = 0
        self.nfqueue = NetfilterQueue()
        self.nfqueue.bind(number, self.callback)
        self.thread = threading.Thread(target=self.nfqueue.run)
        self.thread.daemon = True
        self.thread.start()

    def callback(self, pkt):
        self.count += 1
        pkt.accept()

workers = [Worker(number) for number in (7, 8, 9)]
try:
    print("started")
    while True:
        time.sleep(1)
except KeyboardInterrupt:
    for worker in workers:
        print("queue %d: %d packets" % (worker.number, worker.count))
"""


def test_several_queues_with_an_object_and_a_thread_each(
    start: Callable[..., Program], queued: Callable[..., UdpFlow]
) -> None:
    program = start(THREAD_PER_QUEUE, bound={7, 8, 9})
    program.wait_for("started\n")
    flows = [queued(number=number) for number in (7, 8, 9)]
    payloads = [b"a", b"b", b"c"]
    for count, flow in enumerate(flows, 1):
        flow.send(*payloads[:count])
    for count, flow in enumerate(flows, 1):
        assert flow.receive_all(count) == payloads[:count]
    assert interrupt(program) == [
        "started",
        "queue 7: 1 packets",
        "queue 8: 2 packets",
        "queue 9: 3 packets",
    ]


ASYNCIO_READER = """
import asyncio
from functools import partial
from netfilterqueue import NetfilterQueue

def print_it(pkt):
    print(pkt)
    pkt.accept()

async def tick():
    ticks = 0
    while ticks < 5:
        await asyncio.sleep(0.01)
        ticks += 1
    print("other task done")

nfqueue = NetfilterQueue()
nfqueue.bind(8, print_it)
loop = asyncio.new_event_loop()
loop.add_reader(nfqueue.get_fd(), partial(nfqueue.run, block=False))
loop.create_task(tick())
try:
    loop.run_forever()
except KeyboardInterrupt:
    print("interrupted")
loop.remove_reader(nfqueue.get_fd())
loop.close()
nfqueue.unbind()
"""

POLLING = """
import time
from netfilterqueue import NetfilterQueue

def print_it(pkt):
    print(pkt)
    pkt.accept()

nfqueue = NetfilterQueue()
nfqueue.bind(8, print_it)
try:
    rounds = 0
    while True:
        nfqueue.run(False)
        time.sleep(0.01)
        rounds += 1
        if rounds == 5:
            print("other task done")
except KeyboardInterrupt:
    print("interrupted")
nfqueue.unbind()
"""

TRIO_WAIT = """
import trio
from netfilterqueue import NetfilterQueue

def print_it(pkt):
    print(pkt)
    pkt.accept()

async def other():
    await trio.sleep(0.05)
    print("other task done")

async def serve():
    trio.lowlevel.spawn_system_task(other)
    while True:
        await trio.lowlevel.wait_readable(nfqueue.get_fd())
        nfqueue.run(block=False)

nfqueue = NetfilterQueue()
nfqueue.bind(8, print_it)
try:
    trio.run(serve)
except KeyboardInterrupt:
    print("interrupted")
nfqueue.unbind()
"""

EVENT_LOOPS = {"asyncio": ASYNCIO_READER, "polling": POLLING, "trio": TRIO_WAIT}


@pytest.mark.parametrize("loop", EVENT_LOOPS)
def test_event_loop_runs_the_queue_without_blocking(
    start: Callable[..., Program], queued: Callable[..., UdpFlow], loop: str
) -> None:
    program = start(EVENT_LOOPS[loop], bound={8})
    flow = queued(number=8)
    program.wait_for("other task done")
    for payload in (b"hello", b"again"):
        flow.send(payload)
        assert flow.receive() == payload
    packets = ["UDP packet, 33 bytes"] * 2
    assert interrupt(program) == ["other task done", *packets, "interrupted"]


VERDICT_FROM_A_THREAD = """
import queue
import threading
from netfilterqueue import NetfilterQueue

packets = queue.Queue()

def callback(pkt):
    pkt.retain()
    packets.put(pkt)

def decide():
    while True:
        pkt = packets.get()
        print(pkt)
        if b"bad" in pkt.get_payload():
            pkt.drop()
        else:
            pkt.accept()

thread = threading.Thread(target=decide)
thread.daemon = True
thread.start()
nfqueue = NetfilterQueue()
nfqueue.bind(9, callback)
try:
    nfqueue.run()
except KeyboardInterrupt:
    print("interrupted")
nfqueue.unbind()
"""

VERDICT_FROM_A_TASK = """
import asyncio
import signal
from netfilterqueue import NetfilterQueue

loop = asyncio.new_event_loop()
tasks = set()

async def decide(pkt):
    await asyncio.sleep(0.01)
    print(pkt)
    if b"bad" in pkt.get_payload():
        pkt.drop()
    else:
        pkt.accept()

def callback(pkt):
    pkt.retain()
    task = loop.create_task(decide(pkt))
    tasks.add(task)
    task.add_done_callback(tasks.discard)

nfqueue = NetfilterQueue()
nfqueue.bind(9, callback)
loop.add_reader(nfqueue.get_fd(), nfqueue.run, False)
loop.add_signal_handler(signal.SIGINT, loop.stop)
loop.run_forever()
print("interrupted")
nfqueue.unbind()
loop.close()
"""

LATE_VERDICTS = {"thread": VERDICT_FROM_A_THREAD, "task": VERDICT_FROM_A_TASK}


@pytest.mark.parametrize("kind", LATE_VERDICTS)
def test_retained_packet_is_decided_later(
    start: Callable[..., Program], queued: Callable[..., UdpFlow], kind: str
) -> None:
    program = start(LATE_VERDICTS[kind], bound={9})
    flow = queued(number=9)
    flow.send(b"good 1", b"bad 22", b"good 3")
    assert flow.receive_all(2) == [b"good 1", b"good 3"]
    packets = ["UDP packet, 34 bytes"] * 3
    assert interrupt(program) == [*packets, "interrupted"]
    assert flow.arrived() == []


HELD_IN_COPY_META = """
from netfilterqueue import NetfilterQueue, COPY_META

held = []

def hold(pkt):
    held.append(pkt)
    if len(held) == 3:
        while held:
            pkt = held.pop()
            print("%d of %d bytes" % (pkt.id, pkt.get_payload_len()))
            pkt.accept()

nfqueue = NetfilterQueue()
nfqueue.bind(9, hold, 16, COPY_META)
try:
    nfqueue.run()
except KeyboardInterrupt:
    print("interrupted")
nfqueue.unbind()
"""


def test_packets_kept_without_retain_in_copy_meta(
    start: Callable[..., Program], queued: Callable[..., UdpFlow]
) -> None:
    program = start(HELD_IN_COPY_META, bound={9})
    flow = queued("input", number=9)
    flow.send(b"1", b"2", b"3")
    assert flow.receive_all(3) == [b"3", b"2", b"1"]
    packets = [f"{number} of 0 bytes" for number in (3, 2, 1)]
    assert interrupt(program) == [*packets, "interrupted"]


MARK_AND_REPEAT = """
from netfilterqueue import NetfilterQueue

def mark_it(pkt):
    print("mark %d" % pkt.get_mark())
    pkt.set_mark(10)
    pkt.repeat()

nfqueue = NetfilterQueue()
nfqueue.bind(10, mark_it)
try:
    nfqueue.run()
except KeyboardInterrupt:
    print("interrupted")
nfqueue.unbind()
"""


def test_mark_and_repeat(
    start: Callable[..., Program], traffic: Traffic, rules: Callable[..., Rule]
) -> None:
    program = start(MARK_AND_REPEAT, bound={10})
    flow = traffic.udp("forward")
    rules("FORWARD", "-p", "udp", "-m", "mark", "!", "--mark", "10", queue=10)
    rules("FORWARD", "-p", "udp", "-m", "mark", "!", "--mark", "10", "-j", "DROP")
    flow.send(b"hello", b"again")
    assert flow.receive_all(2) == [b"hello", b"again"]
    assert interrupt(program) == ["mark 0", "mark 0", "interrupted"]


DESCRIBE = """
from netfilterqueue import NetfilterQueue

def describe(pkt):
    mac = ":".join("%02x" % byte for byte in pkt.get_hw()[0:6])
    if pkt.hw_protocol == 0x0800:
        print(pkt)
    else:
        print("not IPv4")
    print("packet %d from %s, hook %d, mark %d" % (pkt.id, mac, pkt.hook, pkt.mark))
    pkt.accept()

nfqueue = NetfilterQueue()
nfqueue.bind(10, describe)
try:
    nfqueue.run()
except KeyboardInterrupt:
    print("interrupted")
nfqueue.unbind()
"""


def test_describe_packets(
    start: Callable[..., Program], queued: Callable[..., UdpFlow], hosts: tuple[Node, Node]
) -> None:
    program = start(DESCRIBE, bound={10})
    for ipv6 in (False, True):
        flow = queued("forward", number=10, ipv6=ipv6)
        flow.send(b"hello")
        assert flow.receive() == b"hello"
    assert interrupt(program) == [
        "UDP packet, 33 bytes",
        f"packet 1 from {hosts[0].mac}, hook 2, mark 0",
        "not IPv4",
        f"packet 2 from {hosts[0].mac}, hook 2, mark 0",
        "interrupted",
    ]

"""Tens of thousands of packets held at once: what each costs, and in which order they may go."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Program, UdpFlow

MANY = 60_000  # the kernel holds at most 65536 in a queue
FEWER = 15_000
PAYLOAD = 128  # bytes, the headers of IPv4 and UDP included
OVERHEAD = 400  # bytes of memory that a packet may cost besides its payload
TIMEOUT = 60.0

# Holds packets, which it sends itself, and decides them. No receive buffer that a user may have
# is large enough for all: they are read in portions.
PROGRAM = """
import json
import resource
import socket
import sys
import threading
from netfilterqueue import NetfilterQueue

queue_num, port, count, size = map(int, sys.argv[1:5])
order = sys.argv[5]
PORTION = 200


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def user_time():
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def pull(into, first, count):
    for start in range(first, first + count, PORTION):
        for number in range(start, start + PORTION):
            sender.send(number.to_bytes(4, "big") + bytes(size - 32))
        taken = start
        while taken < start + PORTION:
            for packet in queue.read(timeout=10):
                into[taken] = packet
                taken += 1


def drop(packets):
    for packet in packets:
        packet.drop()


def drop_in_threads(packets):
    threads = [threading.Thread(target=drop, args=(packets[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sender.connect(("127.0.0.1", port))
queue = NetfilterQueue()
queue.bind(queue_num, max_len=65536, sock_len=212992)
# What Python and the library need once, they have after this.
packets = [None] * PORTION
for _ in range(10):
    pull(packets, 0, PORTION)
    drop(packets)
packets = [None] * count

before = resident(), user_time()
pull(packets, 0, count)
after = resident(), user_time()
for number, packet in enumerate(packets):
    payload = packet.get_payload()
    assert len(payload) == size and payload[28:32] == number.to_bytes(4, "big"), number
del packet, payload

start = user_time()
if order == "in order":
    drop(packets)
elif order == "reversed":
    drop(reversed(packets))
else:
    drop_in_threads(packets)
took = user_time() - start
assert not any(packet.verdict is None for packet in packets)
with open("/proc/self/net/netfilter/nfnetlink_queue") as file:
    rows = [list(map(int, line.split())) for line in file]
print(json.dumps({
    "bytes": (after[0] - before[0]) / count,
    "seconds": (took + after[1] - before[1]) / count,
    "left": sum(row[2] for row in rows if row[0] == queue_num),
}))
queue.close()
sender.close()
"""

ORDERS = ["in order", "reversed", "by several threads"]


@pytest.fixture
def hold(
    run_program: Callable[..., Program], queued: Callable[..., UdpFlow], queue_num: int
) -> Callable[[int, str], dict[str, float]]:
    """Hold packets and decide them; return what each took, and how many are left in the queue."""
    flow = queued()

    def hold(count: int, order: str) -> dict[str, float]:
        arguments = map(str, (queue_num, flow.port, count, PAYLOAD, order))
        costs: dict[str, float] = json.loads(run_program(PROGRAM, *arguments).run(TIMEOUT))
        return costs

    return hold


@pytest.mark.parametrize("order", ORDERS)
def test_packets_can_be_held_by_the_ten_thousand(
    hold: Callable[[int, str], dict[str, float]], order: str
) -> None:
    costs = hold(MANY, order)
    assert costs["left"] == 0
    assert PAYLOAD < costs["bytes"] <= PAYLOAD + OVERHEAD


@pytest.mark.parametrize("order", ORDERS)
def test_time_for_each_does_not_grow_with_their_number(
    hold: Callable[[int, str], dict[str, float]], order: str
) -> None:
    """In this program, the kernel's part not counted. With quadratic time it would be fourfold."""
    assert any(
        hold(MANY, order)["seconds"] < 2 * hold(FEWER, order)["seconds"] for _ in range(3)
    ), "three times slower, which is no chance"

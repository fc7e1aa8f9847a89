"""Verdicts become messages as the kernel wants them. A socket pair takes the kernel's place."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from netfilterqueue._handmade import packets_from

from messages import Wire, simple_packets, verdicts_in
from netfilterqueue import Packet, Verdict

METHODS = {
    Verdict.ACCEPT: Packet.accept,
    Verdict.DROP: Packet.drop,
    Verdict.REPEAT: Packet.repeat,
    Verdict.STOP: Packet.stop,
}
# A verdict's sequence number has the upper bit, by which it is told from a request's.
VERDICT_SEQUENCE = 1 << 31
# Bytes in a send of more than one verdict: with the kernel's bookkeeping it fits into eight pages.
LARGEST_SEND = 32256
NEVER = 60.0  # seconds; no test waits so long for the helper thread


def packets(wire: Wire, *ids: int, queue_num: int = 0) -> list[Packet]:
    """Packets of one read. The verdicts on them arrive when the last of them is decided."""
    made: list[Packet]
    made, _ = packets_from(
        simple_packets(*ids, queue_num=queue_num), fd=wire.fd, verdict_delay=NEVER
    )
    return made


@pytest.mark.parametrize("verdict", METHODS, ids=lambda verdict: verdict.name)
def test_verdict_has_the_kernels_number(wire: Wire, verdict: Verdict) -> None:
    [packet] = packets(wire, 1)
    METHODS[verdict](packet)
    [sent] = wire.verdicts()
    assert sent.verdict == verdict
    assert packet.verdict is verdict


def test_plain_verdict_changes_nothing(wire: Wire) -> None:
    [packet] = packets(wire, 1)
    packet.retain()
    packet.accept()
    [sent] = wire.verdicts()
    assert (sent.mark, sent.payload) == (None, None)


@pytest.mark.parametrize("packet_id", [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_verdict_names_the_packet(wire: Wire, packet_id: int) -> None:
    [packet] = packets(wire, packet_id)
    packet.accept()
    assert wire.ids() == [packet_id]


@pytest.mark.parametrize("queue_num", [0, 1, 0x00FF, 0xFF00, 0xFFFF])
def test_verdict_goes_to_the_packets_queue(wire: Wire, queue_num: int) -> None:
    [packet] = packets(wire, 1, queue_num=queue_num)
    packet.accept()
    assert [sent.queue_num for sent in wire.verdicts()] == [queue_num]


@pytest.mark.parametrize("mark", [0, 1, 0x01020304, 0x80000000, 0xFFFFFFFF])
def test_mark_is_sent_where_one_was_set(wire: Wire, mark: int) -> None:
    [packet] = packets(wire, 1)
    packet.set_mark(mark)
    packet.repeat()
    assert [sent.mark for sent in wire.verdicts()] == [mark]


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("queue_num", [0, 1, 0x1234, 65535])
def test_queue_is_told_in_the_upper_half(wire: Wire, queue_num: int, bypass: bool) -> None:
    [packet] = packets(wire, 1)
    packet.requeue(queue_num, bypass)
    [sent] = wire.verdicts()
    assert sent.verdict == queue_num << 16 | (0x8000 if bypass else 0) | Verdict.QUEUE
    assert packet.verdict is Verdict.QUEUE


@pytest.mark.parametrize(
    ("queue_num", "error", "complaint"),
    [
        (-1, ValueError, "queue_num is -1, but must be from 0 to 65535"),
        (65536, ValueError, "queue_num is 65536, but must be from 0 to 65535"),
        ("1", TypeError, "queue_num must be an integer, not str"),
    ],
)
def test_queue_that_cannot_be_is_refused(
    wire: Wire, queue_num: Any, error: type[Exception], complaint: str
) -> None:
    [packet] = packets(wire, 1)
    with pytest.raises(error, match=complaint):
        packet.requeue(queue_num)
    assert packet.verdict is None
    packet.drop()
    assert wire.ids() == [1]


@pytest.mark.parametrize("length", [*range(1, 10), 1500, 3400, 3600, *range(65528, 65532)])
def test_payload_is_sent_where_one_was_set(wire: Wire, length: int) -> None:
    payload = bytes(itertools.islice(itertools.cycle(range(256)), length))
    [packet] = packets(wire, 1)
    packet.set_payload(payload)
    packet.accept()
    assert [sent.payload for sent in wire.verdicts()] == [payload]


def test_payload_taken_back_is_not_sent(wire: Wire) -> None:
    [packet] = packets(wire, 1)
    packet.set_payload(b"changed")
    packet.set_payload(None)
    packet.accept()
    assert [sent.payload for sent in wire.verdicts()] == [None]


def test_padding_is_zero_whatever_was_sent_before(wire: Wire) -> None:
    for payload in (b"\xff" * 64, b"\1", b"\1\2", b"\1\2\3"):
        first, last = packets(wire, 1, 2)
        first.set_payload(payload)
        first.accept()
        last.accept()
        # The parser insists on it.
        assert [sent.payload for sent in wire.verdicts()] == [payload, None]


def test_verdicts_of_a_read_leave_in_the_order_given(wire: Wire) -> None:
    ids = [5, 3, 9, 1, 7]
    by_id = {packet.id: packet for packet in packets(wire, *sorted(ids))}
    for packet_id in ids:
        by_id[packet_id].drop()
    assert wire.ids() == ids


def test_all_verdicts_of_a_send_have_its_sequence_number(wire: Wire) -> None:
    """An error that comes back for one of them names the send that was refused."""
    seen: list[int] = []
    # One binding has one sequence, thus one call makes all packets.
    remaining = packets(wire, *range(1, 2500))
    for packet in remaining:
        packet.accept()
    while wire.readable:
        sequences = {sent.sequence for sent in wire.verdicts()}
        assert len(sequences) == 1
        seen += sequences
    assert len(seen) > 1
    assert all(sequence & VERDICT_SEQUENCE for sequence in seen)
    assert seen == list(range(seen[0], seen[0] + len(seen)))


def test_full_send_leaves_early(wire: Wire) -> None:
    made = packets(wire, *range(1, 1500))
    for packet in made[:-1]:
        packet.accept()
    [early] = wire.arrived()
    made[-1].accept()
    [late] = wire.arrived()
    # As full as can be: the next plain verdict would not have fitted in.
    assert LARGEST_SEND - 256 < len(early) <= LARGEST_SEND
    assert [sent.id for sent in verdicts_in(early + late)] == list(range(1, 1500))


def test_changed_packets_of_a_read_leave_together(wire: Wire) -> None:
    made = packets(wire, *range(1, 33))
    for packet in made:
        packet.set_payload(bytes(1400))
        packet.accept()
    sends = [wire.ids(), wire.ids()]
    assert sends == [[*range(1, 23)], [*range(23, 33)]]


def test_verdict_too_long_for_a_shared_send_has_one_of_its_own(wire: Wire) -> None:
    made = packets(wire, *range(1, 6))
    made[2].set_payload(bytes(65531))
    for packet in made:
        packet.accept()
    assert [wire.ids() for _ in range(3)] == [[1, 2], [3], [4, 5]]
    assert not wire.readable


class Choice(NamedTuple):
    verdict: Verdict
    mark: int | None
    payload: bytes | None


CHOICES = st.builds(
    Choice,
    st.sampled_from(sorted(METHODS)),
    st.none() | st.integers(0, 0xFFFFFFFF),
    st.none() | st.binary(min_size=1, max_size=64) | st.integers(1, 65531).map(bytes),
)


@settings(derandomize=True, database=None, deadline=None, max_examples=100)
@given(st.data(), st.lists(CHOICES, min_size=1, max_size=60))
def test_any_verdicts_arrive_as_given_none_missing_or_twice(
    data: st.DataObject, choices: list[Choice]
) -> None:
    with contextlib.closing(Wire()) as wire:
        order = data.draw(st.permutations(packets(wire, *range(len(choices)))))
        arrived = []
        for packet in order:
            choice = choices[packet.id]
            if choice.mark is not None:
                packet.set_mark(choice.mark)
            packet.set_payload(choice.payload)
            METHODS[choice.verdict](packet)
            arrived += wire.arrived()
    sent = [verdict for datagram in arrived for verdict in verdicts_in(datagram)]
    assert [verdict.id for verdict in sent] == [packet.id for packet in order]
    for verdict in sent:
        assert (verdict.verdict, verdict.mark, verdict.payload) == choices[verdict.id]
    for datagram in arrived:
        assert len(datagram) <= LARGEST_SEND or len(verdicts_in(datagram)) == 1

"""Packets made by hand: of datagrams that no kernel has sent."""
from libc.string cimport memset

from netfilterqueue._channel cimport slab_of
from netfilterqueue._outbox cimport Outbox
from netfilterqueue._packet cimport Batch, Packet, Tally, new_batch


def packets_from(datagrams, *, int fd=-1, double verdict_delay=0.001, dict interfaces=None):
    """Decode datagrams, bytes-like objects, as if one read had brought them.

    Returns the list of their packets and a dict that counts what was skipped. Their verdicts go
    to the datagram socket ``fd``, with -1 nowhere: this is how the wire format is tested without
    a kernel, and how netfilterqueue.testing makes packets. ``interfaces``: names by index.
    """
    cdef list contents = [bytes(memoryview(datagram)) for datagram in datagrams]
    cdef Outbox outbox = Outbox(fd, verdict_delay)
    cdef Batch batch = new_batch(slab_of(contents), outbox, None)
    cdef Tally tally
    cdef Packet packet
    # Also for packets whose interfaces have no names: its critical section guards them.
    cdef dict names = {} if interfaces is None else interfaces
    cdef list packets = []
    memset(&tally, 0, sizeof(tally))
    if batch.undecided > 1:
        outbox.start_helper()
    while True:
        packet = batch.next(None, names, &tally)
        if packet is None:
            return packets, dict(tally.skipped)
        packet.keep_payload()
        packets.append(packet)

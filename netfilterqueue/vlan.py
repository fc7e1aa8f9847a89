"""A VLAN tag, as a packet of the bridge family has it."""

from __future__ import annotations

from typing import NamedTuple


class Vlan(NamedTuple):
    """A VLAN tag (IEEE 802.1Q), beside the packet and not in its payload."""

    #: The protocol that the tag belongs to: 0x8100 (802.1Q) or 0x88A8 (802.1ad).
    proto: int
    #: Its 16 bits: the priority (3 bits), the drop eligible indicator (1), and the VLAN's id (12).
    tci: int

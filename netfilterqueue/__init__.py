"""Packets that netfilter queues (iptables' NFQUEUE target), decided in Python."""

from netfilterqueue._impl import BUFFER_SIZE, NetfilterQueue
from netfilterqueue._packet import Packet
from netfilterqueue._version import VERSION, __version__
from netfilterqueue.constants import (
    COPY_META,
    COPY_NONE,
    COPY_PACKET,
    PROTOCOLS,
    Hook,
    Verdict,
)

__all__ = [
    "BUFFER_SIZE",
    "COPY_META",
    "COPY_NONE",
    "COPY_PACKET",
    "PROTOCOLS",
    "VERSION",
    "Hook",
    "NetfilterQueue",
    "Packet",
    "Verdict",
    "__version__",
]

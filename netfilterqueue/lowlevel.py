"""NFQUEUE for programs that own the socket and the loop.

`open` a handle, make a socket from its `fd`, and give each datagram that arrives there to
`handle_packet`, which decodes it and calls the queue's callback. Nothing here waits, and nothing
reads the socket but for the kernel's answer to a request such as `create_queue`.
"""

from __future__ import annotations

from ._lowlevel import (
    NetfilterQueueData,
    NetfilterQueueHandle,
    NetfilterQueueQueueHandle,
    open,
)
from ._uapi import (
    NFQA_CFG_F_CONNTRACK,
    NFQA_CFG_F_FAIL_OPEN,
    NFQA_CFG_F_GSO,
    NFQA_CFG_F_SECCTX,
    NFQA_CFG_F_UID_GID,
)
from .constants import COPY_META as NFQNL_COPY_META
from .constants import COPY_NONE as NFQNL_COPY_NONE
from .constants import COPY_PACKET as NFQNL_COPY_PACKET
from .constants import Verdict

__all__ = [
    "NFQA_CFG_F_CONNTRACK",
    "NFQA_CFG_F_FAIL_OPEN",
    "NFQA_CFG_F_GSO",
    "NFQA_CFG_F_SECCTX",
    "NFQA_CFG_F_UID_GID",
    "NFQNL_COPY_META",
    "NFQNL_COPY_NONE",
    "NFQNL_COPY_PACKET",
    "NF_ACCEPT",
    "NF_DROP",
    "NF_QUEUE",
    "NF_REPEAT",
    "NF_STOLEN",
    "NF_STOP",
    "NetfilterQueueData",
    "NetfilterQueueHandle",
    "NetfilterQueueQueueHandle",
    "open",
]

# Plain numbers, so that they print as such.
NF_DROP = int(Verdict.DROP)
NF_ACCEPT = int(Verdict.ACCEPT)
NF_STOLEN = int(Verdict.STOLEN)
NF_QUEUE = int(Verdict.QUEUE)
NF_REPEAT = int(Verdict.REPEAT)
NF_STOP = int(Verdict.STOP)

from collections.abc import Callable
from typing import final

from typing_extensions import Buffer

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

NFQA_CFG_F_CONNTRACK: int
NFQA_CFG_F_FAIL_OPEN: int
NFQA_CFG_F_GSO: int
NFQA_CFG_F_SECCTX: int
NFQA_CFG_F_UID_GID: int
NFQNL_COPY_META: int
NFQNL_COPY_NONE: int
NFQNL_COPY_PACKET: int
NF_ACCEPT: int
NF_DROP: int
NF_QUEUE: int
NF_REPEAT: int
NF_STOLEN: int
NF_STOP: int

def open() -> NetfilterQueueHandle: ...

@final
class NetfilterQueueHandle:
    def bind_pf(self, family: int) -> None: ...
    def close(self) -> None: ...
    def create_queue(
        self, number: int, callback: Callable[[NetfilterQueueData], object]
    ) -> NetfilterQueueQueueHandle: ...
    def fd(self) -> int: ...
    def handle_packet(self, data: Buffer) -> None: ...
    def unbind_pf(self, family: int) -> None: ...

@final
class NetfilterQueueQueueHandle:
    def destroy(self) -> None: ...
    def set_flags(self, mask: int, flags: int) -> None: ...
    def set_maxlen(self, queuelen: int) -> None: ...
    def set_mode(self, mode: int, range: int) -> None: ...

@final
class NetfilterQueueData:
    def get_gid(self) -> int | None: ...
    def get_indev(self) -> int: ...
    def get_nfmark(self) -> int: ...
    def get_outdev(self) -> int: ...
    def get_packet_hw(self) -> bytes: ...
    def get_payload(self) -> bytes: ...
    def get_physindev(self) -> int: ...
    def get_physoutdev(self) -> int: ...
    def get_timestamp(self) -> tuple[int, int]: ...
    def get_uid(self) -> int | None: ...
    def set_verdict(self, verdict: int, mark: int | None = None) -> None: ...

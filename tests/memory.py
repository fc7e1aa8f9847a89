"""How a test shows that something done many times leaves nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 100
# Bytes, fewer than the smallest block of malloc.
LEAST = 16


class MallocInfo(ctypes.Structure):
    """struct mallinfo2 of the GNU C library."""

    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in NAMES.split())


class Usage(NamedTuple):
    blocks: int  # of Python's allocator
    malloc: int  # bytes
    descriptors: int
    objects: int  # known to the collector
    threads: int

    @classmethod
    def now(cls) -> Usage:
        gc.collect()
        return cls(
            sys.getallocatedblocks(),
            malloc_in_use(),
            len(os.listdir("/proc/self/fd")),
            len(gc.get_objects()),
            len(os.listdir("/proc/self/task")),
        )

    def growth(self, before: Usage) -> dict[str, int]:
        """What has grown with the rounds, not just once, as a hash table somewhere may."""
        allowed = Usage(ROUNDS // 2, ROUNDS * LEAST, 0, ROUNDS // 2, 0)
        return {
            name: getattr(self, name) - getattr(before, name)
            for name in self._fields
            if getattr(self, name) - getattr(before, name) > getattr(allowed, name)
        }


def malloc_in_use() -> int:
    """Bytes, those of mmap included; 0 where the C library does not tell."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo2.restype = MallocInfo
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def assert_no_growth(once: Callable[[], object]) -> None:
    """Do something many times. Fail where each time leaves something behind."""
    for _ in range(10):
        once()
    growth = {}
    # What something unrelated has left in one series it does not leave in each: the first loops of
    # asyncio, for example, grow less and less.
    for _ in range(5):
        before = Usage.now()
        for _ in range(ROUNDS):
            once()
        growth = Usage.now().growth(before)
        if not growth:
            return
    raise AssertionError(f"after {ROUNDS} rounds: {growth}")


def public_names(kind: type) -> set[str]:
    """Its attributes and methods, and the special methods that it defines by itself."""
    special = {name for name in vars(kind) if name.startswith("__")}
    special -= {"__doc__", "__new__", "__pyx_vtable__"}
    return {name for name in dir(kind) if not name.startswith("_")} | special


def suppressing(
    error: type[BaseException], call: Callable[..., object], *arguments: Any, **options: Any
) -> None:
    with contextlib.suppress(error):
        call(*arguments, **options)

"""Checks of what users pass to ``bind`` and to ``open``, before anything is sent to the kernel."""

from __future__ import annotations

import inspect
import math
import operator
import os
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from netfilterqueue._uapi import (
    NFQA_CFG_F_CONNTRACK,
    NFQA_CFG_F_FAIL_OPEN,
    NFQA_CFG_F_GSO,
    NFQA_CFG_F_SECCTX,
    NFQA_CFG_F_UID_GID,
)
from netfilterqueue.constants import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# What a queue can be asked for besides, by the names of bind()'s arguments.
FLAGS = {
    "fail_open": NFQA_CFG_F_FAIL_OPEN,
    "gso": NFQA_CFG_F_GSO,
    "conntrack": NFQA_CFG_F_CONNTRACK,
    "uid_gid": NFQA_CFG_F_UID_GID,
    "secctx": NFQA_CFG_F_SECCTX,
}

COPY_MODES = ("COPY_NONE", "COPY_META", "COPY_PACKET")
ENOBUFS_MODES = ("ENOBUFS_RAISE", "ENOBUFS_HANDLE", "ENOBUFS_DISABLE")
# The others need a packet's own circumstances: a number to queue it to, or somebody to keep it.
DEFAULT_VERDICTS = (Verdict.DROP, Verdict.ACCEPT, Verdict.REPEAT, Verdict.STOP)
MAX_UINT32 = 0xFFFFFFFF
MAX_INT = 0x7FFFFFFF
# recvmmsg(2) takes no more (UIO_MAXIOV).
MAX_BATCH = 1024
MAX_VERDICT_DELAY = 3600.0
MAX_TIMEOUT = 1e9
# The kernel doubles a receive buffer's size, and keeps it in an int.
MAX_RECEIVE_BUFFER = 0x3FFFFFFF
# Sizes of a log group's buffer that every kernel takes; others it ignores, and says nothing.
MIN_NLBUF = min(os.sysconf("SC_PAGE_SIZE"), 8192)
MAX_NLBUF = 131072


class Binding(NamedTuple):
    """What ``bind`` was asked for, checked."""

    queue_num: int
    callback: Callable[..., Any] | None
    max_len: int
    mode: int
    copy_range: int
    sock_len: int
    flags: tuple[str, ...]  # names of those that are to be set
    timestamps: bool
    batch: int
    verdict_delay: float
    default_verdict: int | None


def integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """The value as an int; TypeError or ValueError that name it where it is none or outside."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not lowest <= number <= highest:
        raise ValueError(f"{name} is {number}, but must be from {lowest} to {highest}")
    return number


def bytes_of(name: str, value: Any) -> bytes:
    """A copy of a bytes-like object; TypeError that names it where it is none."""
    try:
        return bytes(memoryview(value))
    except TypeError:
        raise TypeError(
            f"{name} must be a bytes-like object, not '{type(value).__name__}'; of a packet that "
            "scapy has made, bytes(packet) is one"
        ) from None


def seconds(name: str, value: Any, highest: float) -> float:
    try:
        # The value as a float; float() would read it from text, too.
        number = math.ldexp(value, 0)
    except TypeError:
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}") from None
    if math.isnan(number) or not 0 <= number <= highest:
        raise ValueError(f"{name} is {number} seconds, but must be from 0 to {highest:g}")
    return number


def one_of(name: str, value: Any, names: Sequence[str]) -> int:
    """The value, if it is the place of one of the names: they are numbered from 0."""
    if value not in range(len(names)):
        text = ", ".join(f"{name} ({number})" for number, name in enumerate(names))
        raise ValueError(f"{name} is {value!r}, but must be {' or '.join(text.rsplit(', ', 1))}")
    return int(value)


def copy_mode(value: Any, name: str = "mode") -> int:
    return one_of(name, value, COPY_MODES)


def verdict_for_all(value: Any) -> int | None:
    """The default verdict, if it is one that suits every packet."""
    if value is None:
        return None
    if value not in DEFAULT_VERDICTS:
        kind = ValueError if isinstance(value, int) else TypeError
        raise kind(
            f"default_verdict is {value!r}, but must be Verdict.DROP, ACCEPT, REPEAT or STOP, or "
            "None to leave undecided packets in the kernel's queue"
        )
    return int(value)


def require_function(name: str, value: Any, argument: str) -> None:
    """TypeError unless it can be called with each packet, and does all of its work then."""
    if not callable(value):
        raise TypeError(f"{name} must be callable with one argument, {argument}; got {value!r}")
    # An object's own __call__ can be one, too.
    if any(map(inspect.iscoroutinefunction, (value, type(value).__call__))):
        raise TypeError(
            f"{name} is a coroutine function, which nobody would await: use a plain function, or "
            "take packets by `async for`"
        )


def one_callback(user_callback: Any, callback: Any) -> Any:
    """The callback under either of the names that programs use for it."""
    if user_callback is not None and callback is not None:
        raise TypeError(
            "bind() got two callbacks: user_callback and callback are the same argument"
        )
    chosen = user_callback if callback is None else callback
    if chosen is not None:
        require_function("the callback", chosen, "the packet")
    return chosen


def check_bind(
    queue_num: Any,
    user_callback: Any,
    max_len: Any,
    mode: Any,
    copy_range: Any,
    sock_len: Any,
    callback: Any,
    flags: Mapping[str, Any],
    timestamps: Any,
    batch: Any,
    verdict_delay: Any,
    default_verdict: Any,
) -> Binding:
    return Binding(
        queue_num=integer("queue_num", queue_num, 0, 0xFFFF),
        callback=one_callback(user_callback, callback),
        max_len=integer("max_len", max_len, 1, MAX_UINT32),
        mode=copy_mode(mode),
        copy_range=integer("range", copy_range, 0, MAX_UINT32),
        sock_len=integer("sock_len", sock_len, 0, MAX_INT),
        flags=tuple(name for name, on in flags.items() if on),
        timestamps=bool(timestamps),
        batch=integer("batch", batch, 1, MAX_BATCH),
        verdict_delay=seconds("verdict_delay", verdict_delay, MAX_VERDICT_DELAY),
        default_verdict=verdict_for_all(default_verdict),
    )


class LogGroup(NamedTuple):
    """What ``nflog.open`` was asked for, checked."""

    group: int
    timeout: int  # hundredths of a second
    qthresh: int
    rcvbuf: int
    nlbuf: int
    enobufs: int
    copymode: int
    range: int
    flags: int


def check_open(
    group: Any,
    timeout: Any,
    qthresh: Any,
    rcvbuf: Any,
    nlbuf: Any,
    enobufs: Any,
    copymode: Any,
    copy_range: Any,
    flags: Any,
) -> LogGroup:
    if nlbuf != 0:
        nlbuf = integer("nlbuf (if it is not 0)", nlbuf, MIN_NLBUF, MAX_NLBUF)
    return LogGroup(
        group=integer("group", group, 0, 0xFFFF),
        timeout=round(seconds("timeout", timeout, MAX_UINT32 / 100) * 100),
        qthresh=integer("qthresh", qthresh, 0, MAX_UINT32),
        rcvbuf=integer("rcvbuf", rcvbuf, 0, MAX_RECEIVE_BUFFER),
        nlbuf=int(nlbuf),
        enobufs=one_of("enobufs", enobufs, ENOBUFS_MODES),
        copymode=copy_mode(copymode, "copymode"),
        range=integer("range", copy_range, 0, MAX_UINT32),
        flags=integer("flags", flags, 0, 7),
    )

"""What ``mypy --strict`` must make of a program that reads a log group. Checked, never executed."""

from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

from netfilterqueue import nflog
from netfilterqueue.conntrack import Conntrack
from netfilterqueue.nflog import Nflog, NflogData
from netfilterqueue.vlan import Vlan


def reads(log: Nflog) -> None:
    assert_type(log.next(), NflogData | None)
    assert_type(log.next(wait=False), NflogData | None)
    assert_type(log.queue(), int)
    assert_type(log.lost, int | None)
    assert_type(log.rcvbuf, int | None)
    log.rcvbuf = 100000
    log.drops = 0
    log.loop(print, count=3)
    for data in log:
        assert_type(data, NflogData)


async def waits(log: Nflog) -> None:
    async for data in log:
        assert_type(data, NflogData)


def opens() -> None:
    with nflog.open(1, timeout=0.5, enobufs=nflog.ENOBUFS_HANDLE) as log:
        assert_type(log, Nflog)
    nflog.open("1")  # type: ignore[arg-type]
    nflog.open(1, 0.5)  # type: ignore[call-arg]


def attributes(data: NflogData) -> None:
    assert_type(data.prefix, str | None)
    assert_type(data.payload, bytes | None)
    assert_type(data.timestamp, float | None)
    assert_type(data.vlan, Vlan | None)
    assert_type(dict(data), dict[str, Any])
    assert_type(data.conntrack, Conntrack | None)
    data.nfmark = 3  # type: ignore[misc]

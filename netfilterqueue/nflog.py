"""Packets that netfilter logs (iptables' target NFLOG, nftables' statement log), read in Python.

    from netfilterqueue import nflog

    with nflog.open(1) as log:
        for data in log:
            print(data.prefix, data.indev, len(data.payload))

Programs written for nflogr run with ``import netfilterqueue.nflog as nflogr``.
"""

from __future__ import annotations

from ._arguments import check_open
from ._nflog import (
    ENOBUFS_DISABLE,
    ENOBUFS_HANDLE,
    ENOBUFS_RAISE,
    FLAG_CONNTRACK,
    FLAG_SEQ,
    FLAG_SEQ_GLOBAL,
    Nflog,
    NflogClosedError,
    NflogDroppedError,
    NflogError,
    NflogRetryError,
    open_group,
)
from ._nflogdata import NflogData
from .constants import COPY_META, COPY_NONE, COPY_PACKET

__all__ = [
    "COPY_META",
    "COPY_NONE",
    "COPY_PACKET",
    "ENOBUFS_DISABLE",
    "ENOBUFS_HANDLE",
    "ENOBUFS_RAISE",
    "FLAG_CONNTRACK",
    "FLAG_SEQ",
    "FLAG_SEQ_GLOBAL",
    "Nflog",
    "NflogClosedError",
    "NflogData",
    "NflogDroppedError",
    "NflogError",
    "NflogRetryError",
    "open",
]


def open(
    group,
    *,
    timeout=0,
    qthresh=1,
    rcvbuf=0,
    nlbuf=0,
    enobufs=ENOBUFS_RAISE,
    copymode=COPY_PACKET,
    range=65535,
    flags=FLAG_SEQ,
):
    """Open the log group ``group`` (0 to 65535), the number in rules with ``--nflog-group``.

    ``timeout``, ``qthresh``
        Messages wait in the kernel until there are ``qthresh`` of them, or the first has waited
        for ``timeout`` seconds (a multiple of 0.01), or ``nlbuf`` is full; then they come together.
        A rule's ``--nflog-threshold`` counts where it is smaller (NFULA_CFG_QTHRESH,
        NFULA_CFG_TIMEOUT).
    ``rcvbuf``
        Bytes of the socket's receive buffer. 0: the system's default. Only the real root exceeds
        net.core.rmem_max.
    ``nlbuf``
        Bytes that messages wait in, in the kernel, a page to 131072. 0: a page
        (NFULA_CFG_NLBUFSIZ).
    ``enobufs``
        What happens when messages did not fit into the receive buffer: NflogDroppedError
        (ENOBUFS_RAISE), or they are counted in ``drops`` only (ENOBUFS_HANDLE); with both, the
        kernel drops all that follow too, until the buffer has been read empty. With
        ENOBUFS_DISABLE it does not, and nothing but ``lost`` tells.
    ``copymode``, ``range``
        COPY_PACKET: up to ``range`` bytes of each packet, 0 for all. COPY_META, COPY_NONE: no
        payload (NFULA_CFG_MODE).
    ``flags``
        FLAG_SEQ, FLAG_SEQ_GLOBAL, FLAG_CONNTRACK: what the kernel tells on request
        (NFULA_CFG_FLAGS). Without FLAG_SEQ there is no ``lost``.

    Raises ValueError or TypeError for a wrong argument, PermissionError without CAP_NET_ADMIN or
    if the group is taken, and OSError for whatever else the kernel refuses.
    """
    return open_group(
        check_open(group, timeout, qthresh, rcvbuf, nlbuf, enobufs, copymode, range, flags)
    )

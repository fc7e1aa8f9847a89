"""Opening log groups: options, refusals, and the programs that do."""

from __future__ import annotations

import contextlib
import errno
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import netfilterqueue.nflog as nflogr
from netfilterqueue.nflog import Nflog
from support import (
    open_groups,
    wait_until,
    without_net_admin,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Program, UdpFlow


def test_group_that_is_taken(log: Nflog) -> None:
    with pytest.raises(PermissionError, match="taken by port id") as caught:
        nflogr.open(log.getgroup())
    assert caught.value.errno == errno.EPERM


def test_missing_capability_is_named(group: int) -> None:
    with without_net_admin(), pytest.raises(PermissionError, match="CAP_NET_ADMIN is needed"):
        nflogr.open(group)
    assert group not in open_groups()


WRONG = {
    "group": (-1, 65536),
    "timeout": (-0.01, 42949673, float("nan")),
    "qthresh": (-1, 2**32),
    "rcvbuf": (-1, 2**30),
    "nlbuf": (-1, 100, 131073),
    "enobufs": (-1, 3),
    "copymode": (-1, 3),
    "range": (-1, 2**32),
    "flags": (-1, 8),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_wrong_option_is_refused_before_anything_is_sent(name: str, value: Any, group: int) -> None:
    arguments: dict[str, Any] = {"group": group, name: value}
    with pytest.raises(ValueError, match=name):
        nflogr.open(**arguments)
    assert group not in open_groups()


@pytest.mark.parametrize("name", sorted({*WRONG} - {"enobufs", "copymode"}))
def test_option_of_a_wrong_type_is_refused(name: str, group: int) -> None:
    arguments: dict[str, Any] = {"group": group, name: "text"}
    with pytest.raises(TypeError, match=name):
        nflogr.open(**arguments)


def test_options_reach_the_kernel(group: int) -> None:
    with nflogr.open(group, timeout=1.25, range=500, rcvbuf=50000) as log:
        # Port id, messages waiting, copy mode, copy range, timeout.
        assert open_groups()[group][1:5] == ["0", "2", "500", "125"]
        assert log.rcvbuf == 50000
        log.rcvbuf = 60000
        assert log.rcvbuf == 60000
        with pytest.raises(ValueError, match="rcvbuf"):
            log.rcvbuf = 0
        with pytest.raises(AttributeError):
            log.queued = 1  # type: ignore[misc]


def test_flag_that_the_kernel_lacks_is_named(group: int) -> None:
    refused = None
    try:
        nflogr.open(group, flags=nflogr.FLAG_CONNTRACK).close()
    except OSError as error:
        refused = error
    if refused is None:
        pytest.skip("this kernel has it")
    assert refused.errno == errno.EOPNOTSUPP
    assert "FLAG_CONNTRACK" in str(refused)
    assert group not in open_groups()


def test_handles_cannot_be_made_otherwise() -> None:
    with pytest.raises(TypeError, match="open"):
        Nflog()
    with contextlib.closing(Nflog.__new__(Nflog)) as log:
        assert log.next(wait=False) is None


# Programs

READMES = {
    "for": "for data in log:\n    print(dict(data)['payload'][28:], flush=True)",
    "next": "while True:\n    data = log.next()\n    print(data.payload[28:], flush=True)",
    "loop": "def callback(data):\n    print(data.payload[28:], flush=True)\nlog.loop(callback)",
}


@pytest.mark.parametrize("form", [*READMES])
def test_program_of_nflogr(
    form: str,
    group: int,
    logged: Callable[..., UdpFlow],
    run_program: Callable[..., Program],
) -> None:
    source = (
        f"import netfilterqueue.nflog as nflogr\nlog = nflogr.open({group})\n"
        f"print('ready', flush=True)\n{READMES[form]}\n"
    )
    program = run_program(source)
    program.wait_for("ready")
    logged().send(b"hello")
    program.wait_for("b'hello'")
    program.interrupt()
    assert program.wait() == -signal.SIGINT
    wait_until(lambda: group not in open_groups())


EXAMPLE = Path(__file__).parents[1] / "examples" / "print_log.py"


def test_example(
    group: int, logged: Callable[..., UdpFlow], run_program: Callable[..., Program]
) -> None:
    program = run_program(EXAMPLE.read_text(), "--group", str(group))
    wait_until(lambda: group in open_groups(), 30)
    logged().send(b"hello")
    program.wait_for("logged: IPv4 from lo, 33 bytes")
    program.interrupt()
    assert program.wait() == 0
    assert "0 lost" in program.output

"""The documents are valid, complete and true: what they show as code is run on real packets."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from docutils import nodes
from docutils.core import publish_doctree

import netfilterqueue
from netfilterqueue import (
    NetfilterQueue,
    Packet,
    conntrack,
    lowlevel,
    nflog,
    stats,
    testing,
    workers,
)
from support import RECEIVE_BUFFER, START_TIMEOUT, Program, Traffic, bound_queues, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.testing import Node, Rule

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.rst"
CONTRIBUTING = ROOT / "CONTRIBUTING.rst"
PACKAGE = ROOT / "netfilterqueue"
EXAMPLES = ROOT / "examples"

# The receive buffer is smaller than asked for where the real root is not at hand.
PYTHON = ("-u", "-X", "faulthandler", "-W", "error", "-W", "ignore:Socket rcvbuf limit")
SOURCE_SUFFIXES = {".py", ".pyi", ".pyx", ".pxd"}


class Block(NamedTuple):
    name: str  # the section's title, and a number where it has several
    language: str
    text: str


def parse(document: Path) -> nodes.document:
    """The document; docutils raises on the least of its warnings."""
    settings = {
        "halt_level": 2,
        "report_level": 2,
        "syntax_highlight": "none",
        "input_encoding": "utf-8",
    }
    return publish_doctree(
        document.read_text(encoding="utf-8"),
        source_path=str(document),
        settings_overrides=settings,
    )


def code_blocks(document: Path, language: str) -> Iterator[Block]:
    seen: dict[str, int] = {}
    for block in parse(document).findall(nodes.literal_block):
        if language not in block["classes"]:
            continue
        section: nodes.Node = block
        while not isinstance(section, nodes.section):
            section = section.parent
        title = section[0].astext()
        seen[title] = seen.get(title, 0) + 1
        name = title if seen[title] == 1 else f"{title} {seen[title]}"
        yield Block(name, language, block.astext())


PROGRAMS = {block.name: block.text for block in code_blocks(README, "python")}
# These are tests, not programs that run a queue.
TESTS_OF_A_FILTER = [PROGRAMS.pop("Testing a filter"), PROGRAMS.pop("Testing a filter 2")]
LOG_READER = PROGRAMS.pop("NFLOG")
LISTER = PROGRAMS.pop("Statistics")
SHELL_LINES = [line for block in code_blocks(README, "sh") for line in block.text.splitlines()]
COMMANDS = [line for line in SHELL_LINES if line.startswith(("iptables ", "ip6tables "))]
[NFT_COMMAND] = [line for line in SHELL_LINES if line.startswith("nft ")]
# What they have is public.
MODULES = (netfilterqueue, conntrack, lowlevel, nflog, stats, testing, workers)


@pytest.mark.parametrize("name", ["README.rst", "CHANGES.rst", "CONTRIBUTING.rst"])
def test_document_is_valid(name: str) -> None:
    assert parse(ROOT / name).next_node(nodes.title)


def test_every_program_of_the_readme_is_run() -> None:
    shown = README.read_text(encoding="utf-8").count("code-block:: python")
    assert len([*PROGRAMS, *TESTS_OF_A_FILTER, LOG_READER, LISTER]) == shown


def test_example_is_the_one_in_the_file() -> None:
    assert PROGRAMS["Example"] == (EXAMPLES / "print_and_accept.py").read_text().rstrip("\n")


def test_first_screen_has_the_two_commands() -> None:
    first_screen = README.read_text(encoding="utf-8").splitlines()[:25]
    for command in ("./ci/demo", "./ci/test"):
        assert any(line.strip().startswith(command) for line in first_screen)
        assert (ROOT / command).stat().st_mode & 0o111


def test_sections_come_in_the_order_of_the_classic_readme() -> None:
    titles = [section[0].astext() for section in parse(README).findall(nodes.section)]
    classic = [
        *("Example", "Installation", "From PyPI", "From source", "API", "NetfilterQueue objects"),
        *("Packet objects", "Another network namespace", "Usage", "Statistics"),
    ]
    assert [title for title in titles if title in classic] == classic
    assert (
        titles.index("Deliberate differences") == titles.index("Coming from NetfilterQueue 1.x") + 1
    )


@pytest.mark.parametrize(
    "name",
    [
        *(name for module in MODULES for name in module.__all__),
        *(name for cls in (NetfilterQueue, Packet) for name in vars(cls) if name[0] != "_"),
    ],
)
def test_public_name_is_documented(name: str) -> None:
    api = README.read_text(encoding="utf-8").partition("\nAPI\n===\n")[2]
    assert f"``{name}" in api


def test_documented_signature_of_bind_is_the_real_one() -> None:
    signature = str(inspect.signature(NetfilterQueue.bind))
    documented = signature.replace("(self, /, ", "(").replace("mode=2", "mode=COPY_PACKET")
    assert f"``bind{documented}``" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS)
def test_rule_of_the_readme_is_accepted(command: str, router: Node) -> None:
    arguments = shlex.split(command)
    router.run(arguments)
    arguments[arguments.index("-I")] = "-D"
    router.run(arguments)


@pytest.mark.stock_kernel
def test_rule_of_nftables_is_accepted(router: Node, nft: Callable[..., None]) -> None:
    nft("chain input { type filter hook input priority 0; }", family="inet")
    router.run(shlex.split(NFT_COMMAND.replace("inet filter", "inet test0")))


def test_readme_shows_rules_for_both_families() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"iptables", "ip6tables"}


def row_names(node: nodes.Node) -> list[str]:
    """The literals in the first cell of a table's row; none in another node."""
    if not isinstance(node, nodes.row):
        return []
    return [literal.astext() for literal in node[0].findall(nodes.literal)]


def files_of_contributing() -> list[list[str]]:
    """The files that each row of the table names, top down."""
    first = next(iter(parse(CONTRIBUTING).findall(lambda node: "_uapi.pxd" in row_names(node))))
    return [row_names(row) for row in first.parent]


def modules_imported_by(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    # What only type checkers import is no dependency.
    text = re.sub(r"^if TYPE_CHECKING:\n(?:(?: +.*)?\n)+", "", text, flags=re.MULTILINE)
    names = re.findall(r"^\s*from (?:netfilterqueue)?\.(\w+) c?import", text, re.MULTILINE)
    # `from . import name` is about a module or about what __init__.py has under that name.
    for name in re.findall(r"^\s*from (?:netfilterqueue|\.) c?import (\w+)", text, re.MULTILINE):
        names.append(name if (PACKAGE / f"{name}.py").exists() else "__init__")
    return set(names)


def test_contributing_names_every_file_of_the_package() -> None:
    sources = {path.name for path in PACKAGE.iterdir() if path.suffix in SOURCE_SUFFIXES}
    assert {name for names in files_of_contributing() for name in names} == sources


def test_files_are_as_short_as_contributing_says() -> None:
    [longest] = re.findall(r"stays below (\d+) lines", CONTRIBUTING.read_text(encoding="utf-8"))
    for names in files_of_contributing():
        for name in names:
            lines = (PACKAGE / name).read_text(encoding="utf-8").splitlines()
            assert len(lines) < int(longest), name


def test_files_import_only_from_those_above_them() -> None:
    above: set[str] = set()
    imports = 0
    for names in files_of_contributing():
        modules = {name.partition(".")[0] for name in names}
        for name in names:
            imported = modules_imported_by(PACKAGE / name)
            assert imported <= above | modules, name
            imports += len(imported)
        above |= modules
    assert imports > len(above)


def is_asleep(pid: int) -> bool:
    """Whether its main thread is in a system call that waits."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2][0] == "S"


def check_filter(
    program: Program,
    queue_num: int,
    rules: Callable[..., Rule],
    traffic: Traffic,
    received: bytes = b"hello",
) -> None:
    """The program lets a datagram through its queue, and ends when it is interrupted."""
    flow = traffic.udp()
    wait_until(
        lambda: queue_num in bound_queues() or program.process.poll() is not None,
        START_TIMEOUT,
        "bound",
    )
    if program.process.poll() is not None:
        program.wait()
        pytest.fail(f"ended by itself:\n{program.output}")
    # While nobody listens the rule drops: what passes was accepted by the program.
    rules("INPUT", "-p", "udp", "--dport", str(flow.port), queue=queue_num)
    flow.send(b"hello")
    assert flow.receive() == received
    assert program.process.poll() is None
    # A signal that comes just before a system call does not interrupt that.
    wait_until(lambda: is_asleep(program.process.pid), what="waiting for the next packet")
    program.interrupt()
    status = program.wait()
    if status == -signal.SIGINT:
        assert "KeyboardInterrupt" in program.output
    else:
        assert status == 0, program.output
        # gevent shows an interrupt that comes while another greenlet runs, and its own error at the
        # end of the program if that has left a switch behind (Hub.handle_system_error).
        shown = "KeyboardInterrupt" in program.output or "InvalidSwitchError" in program.output
        assert "Traceback" not in program.output or shown
    assert queue_num not in bound_queues()


RECEIVED = {"Changing packets": b"good morning", "Changing packets 2": b"HELLO"}
PRINTED = {
    "Example": "UDP packet, 33 bytes",
    "Pulling packets": "UDP packet, 33 bytes",
    "Pulling packets 2": "UDP packet, 33 bytes",
    "Slow callbacks": "UDP packet, 33 bytes",
    "Signals, threads, processes": "stopped",
    "Event loops": "UDP packet, 33 bytes",
    "Event loops 2": "UDP packet, 33 bytes",
    "Event loops 3": "UDP packet, 33 bytes",
    "Your own receive loop": "33 bytes",
    "Coming from 0.1": "queue 1: UDP packet, 33 bytes",
}


def test_expectations_name_programs_of_the_readme() -> None:
    assert {*RECEIVED, *PRINTED} <= {*PROGRAMS}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_of_the_readme(
    name: str,
    run_program: Callable[..., Program],
    rules: Callable[..., Rule],
    traffic: Traffic,
) -> None:
    program = run_program(PROGRAMS[name], python=PYTHON)
    check_filter(program, 1, rules, traffic, RECEIVED.get(name, b"hello"))
    assert PRINTED.get(name, "") in program.output


def test_lister_of_the_readme(
    queue: NetfilterQueue, queue_num: int, run_program: Callable[..., Program]
) -> None:
    queue.bind(queue_num, sock_len=RECEIVE_BUFFER)
    assert run_program(LISTER, python=PYTHON).run() == f"{queue_num} 0 0\n"


def test_log_reader_of_the_readme(
    run_program: Callable[..., Program], rules: Callable[..., Rule], traffic: Traffic
) -> None:
    program = run_program(LOG_READER, python=PYTHON)
    flow = traffic.udp()
    target = ("-j", "NFLOG", "--nflog-group", "1", "--nflog-prefix", "udp: ")
    rules("INPUT", "-p", "udp", "--dport", str(flow.port), *target)

    def opened() -> bool:
        groups = Path("/proc/self/net/netfilter/nfnetlink_log").read_text().split()
        return groups[:1] == ["1"]

    wait_until(opened, START_TIMEOUT, "the group is open")
    flow.send(b"hello")
    program.wait_for("udp: 33 bytes from lo")
    program.interrupt()
    assert program.wait() == -signal.SIGINT


def test_tests_of_the_readme(run_program: Callable[..., Program], tmp_path: Path) -> None:
    for number, text in enumerate(TESTS_OF_A_FILTER):
        (tmp_path / f"test_filter{number}.py").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "examples" / "print_and_accept.py", tmp_path)
    start = "import os, sys, pytest; os.chdir(sys.argv[1]); sys.exit(pytest.main(sys.argv[2:]))"
    # By its module's name the plugin is there also where the library is not installed.
    options = ("-p", "netfilterqueue._pytest_plugin", "-p", "no:cacheprovider")
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    program = run_program(start, str(tmp_path), *options, python=PYTHON, env=alone)
    assert "3 passed" in program.run(START_TIMEOUT)


class Example(NamedTuple):
    queue_num: int | None  # passed as an option; None: the program has its own, 1
    printed: str
    received: bytes = b"hello"


EXPECTED = {
    "asyncio_pull": Example(27, "UDP packet, 33 bytes"),
    "asyncio_run": Example(21, "UDP packet, 33 bytes"),
    "gevent_run_socket": Example(22, "UDP packet, 33 bytes"),
    "pool": Example(28, "UDP packet, 33 bytes"),
    "own_loop": Example(27, "packet of 33 bytes"),
    "print_and_accept": Example(None, "UDP packet, 33 bytes"),
    "scapy_edit": Example(23, "", b"HELLO"),
    "subclass_handle": Example(24, "1 UDP"),
    "threads": Example(25, "queue 25: UDP packet, 33 bytes"),
    "trio_run": Example(26, "UDP packet, 33 bytes"),
    "workers": Example(60, "queue 60: UDP packet, 33 bytes"),
}


# What reads a log group is for test_nflog.py.
@pytest.mark.parametrize(
    "name", sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"print_log"})
)
def test_example(
    name: str,
    run_program: Callable[..., Program],
    rules: Callable[..., Rule],
    traffic: Traffic,
) -> None:
    expected = EXPECTED[name]
    options = [] if expected.queue_num is None else ["--queue-num", str(expected.queue_num)]
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    program = run_program(source, *options, python=PYTHON)
    check_filter(program, expected.queue_num or 1, rules, traffic, expected.received)
    assert expected.printed in program.output

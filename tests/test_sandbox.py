"""The sandbox of `netfilterqueue.testing`; as the tests run in one, here always one in another."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from netfilterqueue import _channel, _namespaces, _sandbox
from netfilterqueue.testing import CommandFailed, Sandbox, SandboxUnavailable
from support import CHAINS, Program, Route, UdpFlow, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from netfilterqueue.testing import Node
    from support import Traffic

CHAINS_OF_A_ROUTER = ("INPUT", "FORWARD", "OUTPUT")

debug_build = pytest.mark.skipif(_channel.alive() is None, reason="needs a debug build")
both_families = pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])


@pytest.fixture(scope="module")
def shared(router: Node) -> Iterator[Sandbox]:
    """A sandbox for the tests that leave it as it was."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def fresh(router: Node) -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def packets_counted(node: Node, chain: str, *, ipv6: bool) -> int:
    """The packets that the only rule of a chain has counted."""
    program = "ip6tables" if ipv6 else "iptables"
    listed = node.run([program, "-v", "-n", "-x", "-L", chain]).stdout
    return int(listed.splitlines()[2].split()[0])


class TestNetwork:
    @both_families
    def test_first_packet_between_hosts_arrives_as_soon_as_the_sandbox_is_made(
        self, fresh: Sandbox, ipv6: bool
    ) -> None:
        flow = UdpFlow(Route.of(fresh, "forward", ipv6=ipv6))
        flow.send(b"first")
        assert flow.receive() == b"first"
        flow.close()

    @both_families
    def test_nothing_is_sent_but_what_a_test_sends(self, fresh: Sandbox, ipv6: bool) -> None:
        for chain in CHAINS_OF_A_ROUTER:
            fresh.router.rule(chain, ipv6=ipv6)
        flow = UdpFlow(Route.of(fresh, "forward", ipv6=ipv6))
        flow.send(b"one", b"two", b"three")
        assert flow.receive_all(3) == [b"one", b"two", b"three"]
        flow.close()
        counts = {
            chain: packets_counted(fresh.router, chain, ipv6=ipv6) for chain in CHAINS_OF_A_ROUTER
        }
        assert counts == {"INPUT": 0, "FORWARD": 3, "OUTPUT": 0}

    @both_families
    @pytest.mark.parametrize("path", CHAINS)
    def test_packets_of_each_path_pass_its_chain(
        self, shared: Sandbox, path: str, ipv6: bool
    ) -> None:
        flow = UdpFlow(Route.of(shared, path, ipv6=ipv6))
        with shared.router.rule(CHAINS[path], "-p", "udp", "--dport", flow.port, ipv6=ipv6):
            flow.send(b"payload")
            assert flow.receive() == b"payload"
            assert packets_counted(shared.router, CHAINS[path], ipv6=ipv6) == 1
        flow.close()

    def test_interfaces_are_those_that_the_nodes_name(self, shared: Sandbox) -> None:
        for node in shared.nodes:
            listed = node.run(["ip", "-o", "link"]).stdout
            assert set(re.findall(r"^\d+: (\w+)", listed, re.MULTILINE)) >= {"lo", *node.interfaces}
            assert node.mac in listed

    def test_router_has_the_first_hosts_side_as_its_address(self, shared: Sandbox) -> None:
        listed = shared.router.run(["ip", "-o", "address", "show", shared.router.interfaces[0]])
        assert f"{shared.router.ipv4}/" in listed.stdout
        assert f"{shared.router.ipv6}/" in listed.stdout


class TestIsolation:
    def test_calling_process_sees_no_interface_of_it(self, router: Node) -> None:
        before = socket.if_nameindex()
        with Sandbox():
            assert socket.if_nameindex() == before

    def test_run_directory_is_private(self, shared: Sandbox) -> None:
        shared.router.run(["touch", "/run/only-here"])
        assert not Path("/run/only-here").exists()

    def test_hosts_share_no_port_and_no_rule(self, shared: Sandbox) -> None:
        with shared.hosts[0].rule("INPUT", "-p", "tcp", queue=1):
            for node in (shared.router, shared.hosts[1]):
                assert "NFQUEUE" not in node.run(["iptables-save"]).stdout

    def test_two_sandboxes_with_the_same_addresses_do_not_meet(
        self, shared: Sandbox, fresh: Sandbox
    ) -> None:
        flows = [UdpFlow(Route.of(sandbox, "forward", ipv6=False)) for sandbox in (shared, fresh)]
        with fresh.router.rule("FORWARD", "-j", "DROP"):
            for flow in flows:
                flow.send(b"payload")
            assert flows[0].receive() == b"payload"
            assert packets_counted(fresh.router, "FORWARD", ipv6=False) == 1
            assert flows[1].arrived() == []
        for flow in flows:
            flow.close()


class TestSocket:
    def test_belongs_to_the_namespace_of_its_node(self, shared: Sandbox) -> None:
        host = shared.hosts[1]
        with host.socket(socket.AF_INET, socket.SOCK_STREAM) as inside:
            inside.bind((host.ipv4, 0))
        elsewhere = shared.router.socket(socket.AF_INET, socket.SOCK_STREAM)
        with elsewhere, pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)):
            elsewhere.bind((host.ipv4, 0))

    def test_is_of_the_kind_asked_for_and_not_inheritable(self, shared: Sandbox) -> None:
        with shared.router.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as opened:
            kind = (opened.family, opened.type, opened.proto)
            assert kind == (socket.AF_NETLINK, socket.SOCK_RAW, 12)
            assert not opened.get_inheritable()

    def test_refusal_is_an_error_with_its_number(self, shared: Sandbox) -> None:
        with pytest.raises(OSError, match=os.strerror(errno.EPROTONOSUPPORT)) as refused:
            shared.router.socket(socket.AF_INET, socket.SOCK_STREAM, 255)
        assert refused.value.errno == errno.EPROTONOSUPPORT
        shared.router.socket(socket.AF_INET, socket.SOCK_STREAM).close()


class TestCommands:
    def test_run_returns_captured_text(self, shared: Sandbox) -> None:
        result = shared.router.run(["cat"], input="text")
        assert (result.stdout, result.stderr, result.args) == ("text", "", ["cat"])

    def test_failure_shows_what_the_command_wrote(self, shared: Sandbox) -> None:
        with pytest.raises(CommandFailed, match=r"ls.*no-such-file.*status 2(.|\n)*cannot access"):
            shared.router.run(["ls", "/no-such-file"])

    def test_failure_is_returned_where_not_checked(self, shared: Sandbox) -> None:
        assert shared.router.run(["false"], check=False).returncode == 1

    def test_unknown_command_is_an_error_of_the_caller(self, shared: Sandbox) -> None:
        with pytest.raises(FileNotFoundError, match="no-such-command"):
            shared.router.run(["no-such-command"])

    def test_unknown_file_is_a_failure_of_the_command(self, shared: Sandbox) -> None:
        with pytest.raises(CommandFailed, match=r"\n/no/such/file: No such file or directory$"):
            shared.hosts[0].run(["/no/such/file"])

    def test_command_that_takes_too_long_is_killed(self, shared: Sandbox) -> None:
        with pytest.raises(subprocess.TimeoutExpired, match=r"'sleep', '100'.* 0.2 seconds"):
            shared.router.run(["sleep", "100"], timeout=0.2)

    def test_process_is_the_command_itself(self, shared: Sandbox) -> None:
        with shared.router.popen(["sleep", "100"]) as process:
            name = Path(f"/proc/{process.pid}/comm")
            wait_until(lambda: name.read_text(encoding="ascii") == "sleep\n")
            process.terminate()
        assert process.returncode == -signal.SIGTERM

    def test_broken_pipe_ends_a_command_as_in_a_shell(self, shared: Sandbox) -> None:
        result = shared.router.run(["sh", "-c", "kill -PIPE $$"], check=False)
        assert result.returncode == -signal.SIGPIPE

    def test_runs_in_the_directory_of_the_caller_or_the_one_given(
        self, shared: Sandbox, tmp_path: Path
    ) -> None:
        assert shared.router.run(["pwd"]).stdout.strip() == os.getcwd()
        assert shared.router.run(["pwd"], cwd=tmp_path).stdout.strip() == str(tmp_path)
        tmp_path.joinpath("program").symlink_to("/bin/pwd")
        assert shared.router.run(["./program"], cwd=tmp_path).stdout.strip() == str(tmp_path)

    def test_system_directories_are_searched_also_when_not_in_path(
        self, shared: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        assert shared.router.run(["sh", "-c", "command -v ip"]).stdout.endswith("/ip\n")

    def test_pid_names_the_namespace(self, shared: Sandbox) -> None:
        for node in shared.nodes:
            inside = node.run(["readlink", "/proc/self/ns/net"]).stdout.strip()
            assert os.readlink(f"/proc/{node.pid}/ns/net") == inside


class TestRules:
    @both_families
    def test_rule_ends_with_its_block(self, shared: Sandbox, ipv6: bool) -> None:
        listing = ["ip6tables-save" if ipv6 else "iptables-save"]
        rule = "-A FORWARD -p udp -j NFQUEUE --queue-num 7 --queue-bypass"
        with shared.router.rule("FORWARD", "-p", "udp", queue=7, bypass=True, ipv6=ipv6):
            assert rule in shared.router.run(listing).stdout
        assert rule not in shared.router.run(listing).stdout

    def test_rule_is_removed_once(self, shared: Sandbox) -> None:
        rule = shared.router.rule("INPUT", "-p", "udp", queue=1)
        rule.remove()
        rule.remove()

    def test_rule_with_a_target_of_its_own_in_another_table(self, shared: Sandbox) -> None:
        with shared.router.rule("PREROUTING", "-j", "MARK", "--set-mark", 5, table="mangle"):
            saved = shared.router.run(["iptables-save", "-t", "mangle"]).stdout
        assert "-A PREROUTING -j MARK --set-xmark 0x5/0xffffffff" in saved

    def test_wrong_rule_shows_what_iptables_says(self, shared: Sandbox) -> None:
        with pytest.raises(CommandFailed, match="No chain/target/match by that name"):
            shared.router.rule("NOWHERE", queue=1)


class TestEnd:
    def test_close_ends_all_programs_also_those_that_left_their_parent(
        self, fresh: Sandbox
    ) -> None:
        nodes = fresh.nodes
        started = [node.popen(["sleep", "1000"]) for node in nodes]
        detached = [
            int(node.run(["sh", "-c", "setsid sleep 1000 >&- 2>&- & echo $!"]).stdout)
            for node in nodes
        ]
        assert all(map(running, detached))
        fresh.close()
        assert not any(map(running, [node.pid for node in nodes]))
        assert [process.returncode for process in started] == [-signal.SIGKILL] * 3
        assert not any(map(running, detached))

    def test_close_is_idempotent_and_later_use_says_closed(self, fresh: Sandbox) -> None:
        rule = fresh.router.rule("INPUT", queue=1)
        fresh.close()
        fresh.close()
        rule.remove()
        with pytest.raises(RuntimeError, match="The sandbox is closed"):
            fresh.router.run(["true"])
        with pytest.raises(RuntimeError, match="The sandbox is closed"):
            fresh.hosts[0].socket(socket.AF_INET, socket.SOCK_DGRAM)

    def test_program_that_starts_while_the_sandbox_ends_does_not_stay(self, fresh: Sandbox) -> None:
        fresh.router.run(["touch", _namespaces.ENDED])
        with pytest.raises(CommandFailed, match="The sandbox has ended"):
            fresh.hosts[0].run(["sleep", "1000"])

    @pytest.mark.parametrize("entered", [False, True])
    def test_everything_ends_when_the_calling_process_is_killed(
        self, run_program: Callable[..., Program], entered: bool
    ) -> None:
        program = run_program(
            """
            import subprocess, sys, time
            from netfilterqueue.testing import Sandbox
            sandbox = Sandbox()
            if sys.argv[1] == "True":
                sandbox.enter_router()
            pids = [node.pid for node in sandbox.nodes]
            pids += [node.popen(["sleep", "1000"]).pid for node in sandbox.nodes]
            print("pids", *pids, "ready")
            time.sleep(1000)
            """,
            str(entered),
        )
        program.wait_for("ready")
        pids = [int(pid) for pid in program.output.split()[1:-1]]
        assert all(map(running, pids))
        program.process.kill()
        wait_until(lambda: not any(map(running, pids)), what="all processes have ended")


class TestEntering:
    def test_process_is_the_router_and_outlives_the_sandbox(
        self, run_program: Callable[..., Program]
    ) -> None:
        program = run_program(
            """
            import os, socket, subprocess
            from netfilterqueue.testing import Sandbox
            with Sandbox() as sandbox:
                directory = os.getcwd()
                sandbox.enter_router()
                assert os.getcwd() == directory
                names = {name for _, name in socket.if_nameindex()}
                assert names >= set(sandbox.router.interfaces), names
                left = sandbox.hosts[0].socket(socket.AF_INET, socket.SOCK_DGRAM)
                with left, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
                    own.bind((sandbox.router.ipv4, 0))
                    own.settimeout(5)
                    left.sendto(b"hello", own.getsockname())
                    assert own.recv(100) == b"hello"
                mine = subprocess.Popen(["sleep", "1000"])
                with sandbox.router.rule("INPUT", "-p", "udp", queue=1):
                    pass
                host = sandbox.hosts[0].pid
            assert not os.path.exists(f"/proc/{host}")
            assert mine.poll() is None, "a process that is not the sandbox's was killed"
            mine.kill()
            mine.wait()
            print("outlived")
            """
        )
        assert program.run() == "outlived\n"

    def test_second_thread_is_refused_with_the_reason(
        self, run_program: Callable[..., Program]
    ) -> None:
        program = run_program(
            """
            import threading
            from netfilterqueue.testing import Sandbox, SandboxUnavailable
            done = threading.Event()
            threading.Thread(target=done.wait).start()
            with Sandbox() as sandbox:
                try:
                    sandbox.enter_router()
                except SandboxUnavailable as error:
                    print(error)
            done.set()
            """
        )
        assert "has 2 threads; enter the sandbox before starting any" in program.run()

    @pytest.mark.real_root
    def test_real_root_may_exceed_the_limit_of_receive_buffers(self, router: Node) -> None:
        forced = getattr(socket, "SO_RCVBUFFORCE", 33)
        limit = int(Path("/proc/sys/net/core/rmem_max").read_text(encoding="ascii"))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            opened.setsockopt(socket.SOL_SOCKET, forced, 2 * limit)
            assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 4 * limit


FORBID_NAMESPACES = """
with open("/proc/sys/user/max_user_namespaces", "w") as setting:
    setting.write("0")
"""


class TestUnavailable:
    def test_forbidden_namespaces_name_the_setting(self, fresh: Sandbox) -> None:
        program = Program(
            fresh.router,
            FORBID_NAMESPACES
            + """
from netfilterqueue.testing import Sandbox, SandboxUnavailable
try:
    Sandbox()
except SandboxUnavailable as error:
    print(error)
""",
        )
        output = program.run()
        program.close()
        assert "sysctl -w user.max_user_namespaces=" in output

    @pytest.mark.parametrize(
        ("missing", "package"),
        [("ip", "iproute2"), ("iptables", "iptables"), ("ip6tables", "iptables")],
    )
    def test_missing_program_names_its_package(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, package: str
    ) -> None:
        for program in {"ip", "iptables", "ip6tables"} - {missing}:
            tmp_path.joinpath(program).symlink_to("/bin/true")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(_sandbox, "SYSTEM_DIRECTORIES", ())
        with pytest.raises(
            SandboxUnavailable, match=rf"install {missing}: package {package} \(Debian"
        ):
            Sandbox()

    @pytest.mark.parametrize(
        ("number", "user_namespace", "advice"),
        [
            (errno.EPERM, False, "needs the real root"),
            (errno.EPERM, True, "--security-opt"),
            (errno.EROFS, True, "--security-opt"),
            (errno.ENOSPC, True, "nested too deep"),
            (errno.EINVAL, True, "The kernel needs"),
        ],
    )
    def test_refusal_says_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch, number: int, user_namespace: bool, advice: str
    ) -> None:
        monkeypatch.setattr(_sandbox, "SETTINGS", ())
        error = OSError(number, os.strerror(number), "unshare")
        text = _sandbox.explain(error, user_namespace=user_namespace)
        assert "unshare" in text
        assert os.strerror(number) in text
        assert advice in text


class TestPytestPlugin:
    TEST = """
def test_fixture(nfqueue_sandbox):
    left, right = nfqueue_sandbox.hosts
    assert left.run(["ip", "route", "get", right.ipv4]).stdout
"""

    @pytest.mark.parametrize(
        ("forbidden", "required", "outcome"),
        [
            (False, "1", "1 passed"),
            (True, "0", "1 skipped"),
            (True, "1", "1 error"),
        ],
    )
    def test_fixture_is_a_sandbox_or_says_why_not(
        self, fresh: Sandbox, tmp_path: Path, forbidden: bool, required: str, outcome: str
    ) -> None:
        test = tmp_path / "test_fixture.py"
        test.write_text((FORBID_NAMESPACES if forbidden else "") + self.TEST, encoding="ascii")
        program = Program(
            fresh.router,
            "import pytest, sys; pytest.main(sys.argv[1:])",
            *("-p", "netfilterqueue._pytest_plugin", "-p", "no:cacheprovider", "-rs", str(test)),
            env={
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                "NETFILTERQUEUE_REQUIRE_NAMESPACES": required,
            },
        )
        output = program.run(timeout=30)
        program.close()
        assert outcome in output
        assert ("max_user_namespaces" in output) == forbidden

    def test_unused_plugin_imports_no_sandbox(self, run_program: Callable[..., Program]) -> None:
        program = run_program(
            """
            import sys
            import netfilterqueue._pytest_plugin
            print("netfilterqueue._sandbox" in sys.modules)
            """
        )
        assert program.run() == "False\n"


class TestThisSuite:
    """What the suite itself does where namespaces are forbidden."""

    @pytest.mark.parametrize(
        ("required", "status", "outcome"),
        [("0", 0, "1 passed, 1 skipped"), ("1", pytest.ExitCode.USAGE_ERROR, "ERROR: No sandbox")],
    )
    def test_skips_what_needs_them_or_fails_as_a_whole(
        self, fresh: Sandbox, tmp_path: Path, required: str, status: int, outcome: str
    ) -> None:
        tmp_path.joinpath("test_two.py").write_text(
            "def test_real(router): pass\ndef test_other(): pass\n", encoding="ascii"
        )
        search = [str(Path(__file__).parent), *sys.path]
        program = Program(
            fresh.router,
            FORBID_NAMESPACES + "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))",
            *("-p", "conftest", "-p", "no:cacheprovider", "-rs", str(tmp_path)),
            env={
                "PYTHONPATH": os.pathsep.join(search),
                "NETFILTERQUEUE_REQUIRE_NAMESPACES": required,
            },
        )
        assert program.wait(timeout=30) == status
        program.close()
        assert outcome in program.output
        assert "max_user_namespaces" in program.output


class TestNothingLeft:
    """The check that follows each test."""

    @pytest.mark.parametrize(
        ("test", "complaint"),
        [
            ("rules('OUTPUT', '-p', 'udp', queue=queue_num)", None),
            ("router.rule('OUTPUT', '-p', 'udp', queue=queue_num, ipv6=True)", "a rule was left"),
            ("queue.bind(queue_num, print)", "a queue was left bound"),
            pytest.param(
                "kept.append(netfilterqueue.NetfilterQueue())", "left alive", marks=debug_build
            ),
        ],
    )
    def test_what_a_test_leaves_behind_is_an_error(
        self, run_program: Callable[..., Program], tmp_path: Path, test: str, complaint: str | None
    ) -> None:
        tmp_path.joinpath("test_one.py").write_text(
            "import netfilterqueue\n"
            "queue = netfilterqueue.NetfilterQueue()\n"
            "kept = []\n"
            f"def test_one(router, rules, queue_num):\n    {test}\n",
            encoding="ascii",
        )
        search = [str(Path(__file__).parent), *sys.path]
        program = run_program(
            "import pytest, sys; pytest.main(sys.argv[1:])",
            *("-p", "conftest", "-p", "no:cacheprovider", str(tmp_path)),
            env={"PYTHONPATH": os.pathsep.join(search)},
        )
        output = program.run(timeout=30)
        assert "1 passed" in output
        assert ("1 error" in output) == (complaint is not None)
        assert complaint is None or complaint in output


class TestTraffic:
    """The traffic makers of the tests themselves."""

    @both_families
    @pytest.mark.parametrize("path", CHAINS)
    def test_ping_is_answered(self, traffic: Traffic, path: str, ipv6: bool) -> None:
        ping = traffic.ping(path, ipv6=ipv6)
        ping.send(b"payload!")
        assert ping.receive() == b"payload!"

    @both_families
    @pytest.mark.parametrize("path", CHAINS)
    def test_tcp_transfer_is_complete(self, traffic: Traffic, path: str, ipv6: bool) -> None:
        data = os.urandom(300_000)
        assert traffic.tcp(path, data, ipv6=ipv6).result() == data

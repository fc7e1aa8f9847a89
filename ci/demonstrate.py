"""Shows examples/print_and_accept.py at work: a router queues the packets between two hosts."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from netfilterqueue.testing import Node, Sandbox, SandboxUnavailable

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "print_and_accept.py"
QUEUE = 1  # the one that the example binds
TIMEOUT = 10.0  # seconds, for anything that is waited for


def announce(node: Node, what: str) -> None:
    print(f"\n[{node.name}] {what}", flush=True)


def wait_until_bound(router: Node) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not router.run(["cat", "/proc/net/netfilter/nfnetlink_queue"]).stdout:
        if time.monotonic() > deadline:
            raise TimeoutError("the example does not bind its queue")
        time.sleep(0.01)


def packets_queued(router: Node) -> int:
    """What the kernel says: to how many packets the rule has applied."""
    rules = router.run(["iptables", "--verbose", "--list-rules", "FORWARD"]).stdout.splitlines()
    rule = next(line.split() for line in rules if "NFQUEUE" in line)
    return int(rule[rule.index("-c") + 1])


def ping(client: Node, server: Node) -> None:
    command = ["ping", "-c", "3", "-i", "0.2", "-W", "5", server.ipv4]
    announce(client, shlex.join(command))
    client.run(command)


def send_datagrams(client: Node, server: Node) -> None:
    announce(client, f"sends three UDP datagrams to {server.ipv4}")
    receiver = server.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender = client.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, sender:
        receiver.settimeout(TIMEOUT)
        receiver.bind((server.ipv4, 0))
        for _ in range(3):
            sender.sendto(b"hello", receiver.getsockname())
            receiver.recv(100)


def talk_over_tcp(client: Node, server: Node) -> None:
    announce(client, f"talks to {server.ipv4} over TCP")
    listener = server.socket(socket.AF_INET, socket.SOCK_STREAM)
    caller = client.socket(socket.AF_INET, socket.SOCK_STREAM)
    with listener, caller:
        listener.settimeout(TIMEOUT)
        caller.settimeout(TIMEOUT)
        listener.bind((server.ipv4, 0))
        listener.listen()
        caller.connect(listener.getsockname())
        with listener.accept()[0] as answerer:
            caller.sendall(b"hello")
            answerer.sendall(answerer.recv(100))
        while caller.recv(100):
            pass


def main() -> None:
    with Sandbox() as sandbox:
        router, (left, right) = sandbox.router, sandbox.hosts
        announce(router, f"iptables -A FORWARD -j NFQUEUE --queue-num {QUEUE}")
        router.rule("FORWARD", queue=QUEUE)
        announce(router, f"python {EXAMPLE.relative_to(ROOT)}")
        example = router.popen(
            [sys.executable, "-u", str(EXAMPLE)], stdout=subprocess.PIPE, text=True
        )
        assert example.stdout is not None  # the pipe
        wait_until_bound(router)
        printed = 0
        for exchange in (ping, send_datagrams, talk_over_tcp):
            exchange(left, right)
            # What was exchanged has arrived, hence has been accepted, after it was printed.
            while printed < packets_queued(router):
                print(f"    {example.stdout.readline()}", end="", flush=True)
                printed += 1
        example.send_signal(signal.SIGINT)
        example.communicate(timeout=TIMEOUT)
        if example.returncode != 0:
            raise RuntimeError(f"the example ended with status {example.returncode}")
    print(f"\n{printed} packets printed and accepted")


if __name__ == "__main__":
    try:
        main()
    except SandboxUnavailable as error:
        sys.exit(f"error: {error}")

"""The numbers of ``netfilterqueue.constants`` are those of the kernel's headers."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess

import pytest

import netfilterqueue
from netfilterqueue import PROTOCOLS, Hook, NetfilterQueue, Verdict

HOOK_NAMES = {
    Hook.PREROUTING: "PRE_ROUTING",
    Hook.INPUT: "LOCAL_IN",
    Hook.FORWARD: "FORWARD",
    Hook.OUTPUT: "LOCAL_OUT",
    Hook.POSTROUTING: "POST_ROUTING",
}
VALUES = {
    **{f"NF_{verdict.name}": verdict for verdict in Verdict},
    **{f"NF_INET_{HOOK_NAMES[hook]}": hook for hook in Hook},
    "NFQNL_COPY_NONE": netfilterqueue.COPY_NONE,
    "NFQNL_COPY_META": netfilterqueue.COPY_META,
    "NFQNL_COPY_PACKET": netfilterqueue.COPY_PACKET,
}


def headers_agree(kernel_name: str, value: int) -> bool:
    """Whether the compiler, reading the kernel's headers, finds that name to be that value."""
    source = f"""
        #include <linux/netfilter.h>
        #include <linux/netfilter/nfnetlink_queue.h>
        _Static_assert({kernel_name} == {value}, "another value");
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    result = subprocess.run(
        [*compiler, "-fsyntax-only", "-x", "c", "-"],
        input=source,
        text=True,
        capture_output=True,
        check=False,
        timeout=30,
        # The sanitizers look at the library, which they are preloaded for, not at the compiler.
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )
    return result.returncode == 0


@pytest.mark.parametrize(("kernel_name", "value"), VALUES.items())
def test_value_is_the_kernel_headers(kernel_name: str, value: int) -> None:
    assert headers_agree(kernel_name, value)
    assert not headers_agree(kernel_name, value + 1)


@pytest.mark.parametrize("name", ["COPY_NONE", "COPY_META", "COPY_PACKET"])
def test_copy_modes_are_attributes_of_the_class_too(name: str) -> None:
    assert getattr(NetfilterQueue, name) == getattr(netfilterqueue, name)


def test_protocols_has_every_number_that_had_a_name() -> None:
    assert list(PROTOCOLS) == [*range(141), 255]


def test_protocol_names_are_distinct() -> None:
    assert len(set(PROTOCOLS.values())) == len(PROTOCOLS)
    assert all(PROTOCOLS.values())


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (socket.IPPROTO_ICMP, "ICMP"),
        (socket.IPPROTO_IGMP, "IGMP"),
        (socket.IPPROTO_TCP, "TCP"),
        (socket.IPPROTO_EGP, "EGP"),
        (socket.IPPROTO_PUP, "PUP"),
        (socket.IPPROTO_UDP, "UDP"),
        (socket.IPPROTO_IPV6, "IPv6"),
        (socket.IPPROTO_ROUTING, "IPv6-Route"),
        (socket.IPPROTO_FRAGMENT, "IPv6-Frag"),
        (socket.IPPROTO_RSVP, "RSVP"),
        (socket.IPPROTO_GRE, "GRE"),
        (socket.IPPROTO_ESP, "ESP"),
        (socket.IPPROTO_AH, "AH"),
        (socket.IPPROTO_ICMPV6, "IPv6-ICMP"),
        (socket.IPPROTO_NONE, "IPv6-NoNxt"),
        (socket.IPPROTO_DSTOPTS, "IPv6-Opts"),
        (socket.IPPROTO_PIM, "PIM"),
        (socket.IPPROTO_SCTP, "SCTP"),
        (socket.IPPROTO_UDPLITE, "UDPLite"),
        (4, "IP"),
        (61, "any host internal protocol"),
        (89, "OSPFIGP"),
        (112, "VRRP"),
        (140, "Shim6"),
        (255, "Reserved"),
    ],
)
def test_protocol_name(number: int, name: str) -> None:
    assert PROTOCOLS[number] == name

"""What the kernel's own tests of queues do, as far as it needs what not every kernel has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support import RECEIVE_BUFFER, numbered, run_until, udp_data

if TYPE_CHECKING:
    from collections.abc import Callable

    from netfilterqueue import NetfilterQueue, Packet
    from support import Traffic

pytestmark = pytest.mark.stock_kernel


class TestNftables:
    @pytest.mark.parametrize("flags", ["", "flags bypass"])
    @pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
    def test_statement_queues_packets(
        self,
        queue: NetfilterQueue,
        queue_num: int,
        nft: Callable[..., None],
        traffic: Traffic,
        ipv6: bool,
        flags: str,
    ) -> None:
        seen: list[bytes] = []

        def accept(packet: Packet) -> None:
            seen.append(udp_data(packet))
            packet.accept()

        flow = traffic.udp("forward", ipv6=ipv6)
        queue.bind(queue_num, accept, sock_len=RECEIVE_BUFFER)
        nft(
            "chain forward { type filter hook forward priority filter;"
            f" udp dport {flow.port} queue {flags} to {queue_num}; }}",
            family="inet",
        )
        flow.send(*numbered(5))
        run_until(queue, lambda: len(seen) == 5)
        assert seen == flow.receive_all(5) == numbered(5)

"""A program for python-libnetfilter-queue runs on `netfilterqueue.lowlevel`, on real traffic."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from support import bound_queues, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from support import Program, UdpFlow

# The example of python-libnetfilter-queue's documentation, in Python 3 where it is in Python 2; it
# ends when it is interrupted.
EXAMPLE = """
import sys
import netfilterqueue.lowlevel as libnetfilterqueue
import socket
import struct

def handle_tcp(payload):
    src, dst = struct.unpack('HH', payload[:4])
    print('    tcp.src: %s' % src)
    print('    tcp.dst: %s' % dst)

def handle_udp(payload):
    src, dst = struct.unpack('HH', payload[:4])
    print('    udp.src: %s' % src)
    print('    udp.dst: %s' % dst)

def handle_ipv4(payload):
    ip_verlen = payload[0]
    ip_ver = ip_verlen >> 4
    assert ip_ver == 4
    src = socket.inet_ntop(socket.AF_INET, payload[12:16])
    dst = socket.inet_ntop(socket.AF_INET, payload[16:20])
    print('    ipv4.src: %s' % src)
    print('    ipv4.dst: %s' % dst)
    protocol = payload[9]
    hdrlen = (ip_verlen & 0x0f) * 4
    data = payload[hdrlen:]
    handler = {6: handle_tcp, 17: handle_udp}
    if protocol in handler:
        handler[protocol](data)

def handle_ipv6(payload):
    ip_verlen = payload[0]
    ip_ver = ip_verlen >> 4
    assert ip_ver == 6
    src = socket.inet_ntop(socket.AF_INET6, payload[8:24])
    dst = socket.inet_ntop(socket.AF_INET6, payload[24:40])
    print('    ipv6.src: %s' % src)
    print('    ipv6.dst: %s' % dst)
    protocol = payload[6]
    data = payload[40:]
    handler = {6: handle_tcp, 17: handle_udp}
    if protocol in handler:
        handler[protocol](data)

def callback(data):
    try:
        print('Received:')
        mac_bytes = data.get_packet_hw()
        mac_string = (':'.join(['%02x'] * len(mac_bytes)) %
                      struct.unpack("B" * len(mac_bytes), mac_bytes))
        print('    eth.src: %s' % mac_string)
        payload = data.get_payload()
        ip_verlen = payload[0]
        ip_ver = ip_verlen >> 4
        handler = {4: handle_ipv4, 6: handle_ipv6}
        if ip_ver in handler:
            handler[ip_ver](payload)
        data.set_verdict(libnetfilterqueue.NF_ACCEPT, mark=None)
        print()
    except Exception as e:
        print(e)

handle = libnetfilterqueue.open()

handle.unbind_pf(socket.AF_INET)
handle.unbind_pf(socket.AF_INET6)

handle.bind_pf(socket.AF_INET)
handle.bind_pf(socket.AF_INET6)

queue = handle.create_queue(int(sys.argv[1]), callback)
queue.set_mode(libnetfilterqueue.NFQNL_COPY_PACKET, 0xffff)
print('ready')

try:
    sock = socket.fromfd(handle.fd(),
                         socket.AF_UNIX,
                         socket.SOCK_STREAM)
    while True:
        try:
            data = sock.recv(4096)
            handle.handle_packet(data)
        except socket.error as e:
            if e.errno is socket.errno.ENOBUFS:
                print('Unable to hold processed packets')
                continue
            raise
except KeyboardInterrupt:
    print('interrupted')
finally:
    sock.close()

queue.destroy()

handle.close()
"""


@pytest.mark.parametrize("ipv6", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("path", ["loopback", "input", "forward", "output"])
def test_example_of_the_readme(
    run_program: Callable[..., Program],
    queued: Callable[..., UdpFlow],
    queue_num: int,
    path: str,
    ipv6: bool,
) -> None:
    program = run_program(EXAMPLE, str(queue_num))
    program.wait_for("ready")
    flow = queued(path, ipv6=ipv6)
    sent = [b"1", b"22", b"333"]
    flow.send(*sent)
    assert flow.receive_all(len(sent)) == sent
    wait_until(lambda: bound_queues()[queue_num].depth == 0)
    program.interrupt()
    output = program.run()
    source = flow.sender.getsockname()
    # The example takes ports for numbers of the host's byte order.
    ports = [socket.htons(port) for port in (source[1], flow.port)]
    family = "ipv6" if ipv6 else "ipv4"
    assert output.count("Received:") == len(sent)
    assert output.count(f"    {family}.src: {source[0]}\n") == len(sent)
    assert output.count(f"    udp.src: {ports[0]}\n    udp.dst: {ports[1]}\n") == len(sent)
    # What this host made has no link header yet.
    assert output.count("    eth.src: \n") == (len(sent) if path == "output" else 0)
    assert output.endswith("interrupted\n")
    assert queue_num not in bound_queues()

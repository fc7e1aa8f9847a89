"""Receive packets in a loop of your own, beside the program's other work."""

import argparse
import contextlib
import selectors
import socket

from netfilterqueue import lowlevel


def print_and_accept(data):
    print(f"packet of {len(data.get_payload())} bytes")
    data.set_verdict(lowlevel.NF_ACCEPT)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1)
    arguments = parser.parse_args()

    handle = lowlevel.open()
    handle.create_queue(arguments.queue_num, print_and_accept)
    sock = socket.fromfd(handle.fd(), socket.AF_NETLINK, socket.SOCK_RAW)
    with selectors.DefaultSelector() as selector, contextlib.suppress(KeyboardInterrupt):
        selector.register(sock, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=10):
                handle.handle_packet(sock.recv(69632))
            else:
                print("nothing for 10 seconds")
    sock.close()
    handle.close()


if __name__ == "__main__":
    main()

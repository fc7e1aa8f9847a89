"""Run a queue in one greenlet while another one works: gevent does the waiting."""

import gevent.monkey

gevent.monkey.patch_all()

import argparse  # noqa: E402 - gevent replaces parts of what is imported from here on
import contextlib  # noqa: E402
import socket  # noqa: E402

import gevent  # noqa: E402

from netfilterqueue import NetfilterQueue  # noqa: E402


def print_and_accept(packet):
    print(packet)
    packet.accept()


def tell_the_time():
    seconds = 0
    while True:
        print(f"running for {seconds} s")
        gevent.sleep(1)
        seconds += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1)
    arguments = parser.parse_args()

    with NetfilterQueue() as queue:
        queue.bind(arguments.queue_num, print_and_accept)
        clock = gevent.spawn(tell_the_time)
        sock = socket.fromfd(queue.get_fd(), socket.AF_NETLINK, socket.SOCK_RAW)
        with sock, contextlib.suppress(KeyboardInterrupt):
            queue.run_socket(sock)
        clock.kill()


if __name__ == "__main__":
    main()

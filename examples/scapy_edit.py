"""Change what packets carry, with scapy: the data of every UDP packet in upper case."""

import argparse
import contextlib

from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from netfilterqueue import NetfilterQueue


def to_upper_case(packet):
    ip = IP(packet.get_payload())
    if UDP in ip and Raw in ip:
        ip[Raw].load = ip[Raw].load.upper()
        # scapy computes a field that was deleted when it builds the packet again.
        del ip[IP].len, ip[IP].chksum, ip[UDP].len, ip[UDP].chksum
        packet.set_payload(bytes(ip))
    packet.accept()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queue-num", type=int, default=1)
    arguments = parser.parse_args()

    with NetfilterQueue() as queue:
        queue.bind(arguments.queue_num, to_upper_case)
        with contextlib.suppress(KeyboardInterrupt):
            queue.run()


if __name__ == "__main__":
    main()

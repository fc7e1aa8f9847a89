"""A line for each packet that a rule logs (-j NFLOG --nflog-group 1 --nflog-prefix "logged: ")."""

import argparse

from netfilterqueue import nflog

PROTOCOLS = {0x0800: "IPv4", 0x86DD: "IPv6"}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", type=int, default=1)
    arguments = parser.parse_args()

    with nflog.open(arguments.group, qthresh=100, timeout=0.1) as log:
        try:
            for data in log:
                protocol = PROTOCOLS.get(data.proto, "another protocol")
                where = f"from {data.indev}" if data.indev else f"to {data.outdev}"
                print(f"{data.prefix}{protocol} {where}, {len(data.payload)} bytes")
        except KeyboardInterrupt:
            print(f"{log.lost} lost")


if __name__ == "__main__":
    main()

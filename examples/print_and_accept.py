from netfilterqueue import NetfilterQueue


def print_and_accept(packet):
    print(packet)
    packet.accept()


queue = NetfilterQueue()
queue.bind(1, print_and_accept)
try:
    queue.run()
except KeyboardInterrupt:
    pass
finally:
    queue.unbind()

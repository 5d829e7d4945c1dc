"""Takes GRE and IP in IP off packets and gives what is inside to the kernel, which may have no tunnels of its own.

``decapsulate.py`` runs in the namespace of a server, as root; standard library only.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_SO_RCVBUFFORCE = 33
_GRE, _IPIP, _IPV6 = 47, 4, 41


def main() -> None:
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"inside", _IFF_TUN | _IFF_NO_PI))
    os.system("ip link set inside up mtu 9000")
    sockets: dict[int, tuple[socket.socket, bool, int]] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for protocol in (_GRE, _IPIP, _IPV6):
            made = socket.socket(family, socket.SOCK_RAW, protocol)
            made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 24)
            sockets[made.fileno()] = made, family == socket.AF_INET, protocol
    poll = select.epoll()
    for number in sockets:
        poll.register(number, select.EPOLLIN)
    print("ready", flush=True)
    while True:
        for number, _ in poll.poll():
            made, has_header, protocol = sockets[number]
            try:
                while True:
                    packet = made.recv(1 << 16, socket.MSG_DONTWAIT)
                    # Raw sockets of IPv4 give the IP header, too, those of IPv6 do not.
                    begin = (packet[0] & 15) * 4 if has_header else 0
                    os.write(tun, packet[begin + (4 if protocol == _GRE else 0) :])
            except BlockingIOError:
                pass


if __name__ == "__main__":
    main()

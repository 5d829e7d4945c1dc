"""An L4 balancer on raw sockets: the core in C, and the driver that connects it to shared memory."""

from .source import AfPacketBalancer

__all__ = ["AfPacketBalancer"]

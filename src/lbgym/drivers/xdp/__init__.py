"""An L4 balancer for TCP in the kernel, by XDP: the program, and the driver that connects it to shared memory."""

from .build import build_object
from .options import XdpOptions
from .source import XdpBalancer, detach

__all__ = ["XdpBalancer", "XdpOptions", "build_object", "detach"]

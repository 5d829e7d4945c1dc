"""An L4 balancer for TCP in the kernel, by XDP."""

"""Redirection by eBPF programs: sockets are pointed at ztunnel, and no packet is changed on its way."""

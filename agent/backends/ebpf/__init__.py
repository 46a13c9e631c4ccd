# SPDX-License-Identifier: Apache-2.0
"""Redirection by eBPF programs: sockets are pointed at ztunnel, and no packet is changed on its way."""

# SPDX-License-Identifier: Apache-2.0
"""The kernel's grace period: the wait for packets that are in the hooks of netfilter while rules change.

Rules of two mechanisms are on hooks of their own, which a packet passes one after the other. A processor may be taken
from it in between, by an interrupt or by a hypervisor, for longer than a change of both takes. Such a packet passes the
new hook before its rules are there and the old hook after its rules are gone, and so escapes.
"""

from __future__ import annotations

import socket

from agent.core.errors import KernelError


def await_packets() -> None:
    """Returns once every packet that was in a hook at the time of the call has left it. Blocks for some 5 to 30 ms.

    Hooks are readers of RCU, and to close a packet socket waits for a grace period (packet_release in the kernel's
    net/packet/af_packet.c). membarrier(2) does too, but not on one CPU and not with nohz_full. Raises KernelError.
    """
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC).close()
    except OSError as error:
        raise KernelError("wait for packets under way", error.errno or 0, error.strerror or str(error)) from error

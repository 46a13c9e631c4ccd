# SPDX-License-Identifier: Apache-2.0
"""The listeners of ztunnel inside a pod, and how two ztunnels share them during a restart.

The old and the new instance listen on the same ports by SO_REUSEPORT. Closing a listener resets the connections in its
accept queue, so the old one must stop getting connections before it closes. A classic BPF program that returns 1
chooses the group's member with index 1, which is the newer of two; with one member the index is out of range and the
kernel falls back to hashing, which finds that one. (Checked on 6.18. With three members at once the middle one is
chosen: no two restarts at a time.)

The workers of one instance share each listener; they do not listen separately. So the accept queue outlives a worker
that dies, an instance stays one member of the group for the program above, and eBPF, which holds one listener of each
port, need not know how many workers there are.
"""

from __future__ import annotations

import array
import contextlib
import errno
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.core import names
from agent.kernel.netlink.sock_diag import SockDiag
from agent.ztunnel.relay.upstream import IP_TRANSPARENT, marked

BACKLOG = 4096
SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)
_RETURN_1 = array.array("B", struct.pack("=HBBI", 0x06, 0, 0, 1))  # struct sock_filter: BPF_RET | BPF_K, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """All bound sockets of one pod.

    `dns_*` has one for each loopback address of the pod; `hbone` is None without a mesh.
    """

    outbound: socket.socket
    inbound: socket.socket
    dns_tcp: tuple[socket.socket, ...]
    dns_udp: tuple[socket.socket, ...]
    hbone: socket.socket | None

    def every_tcp(self) -> tuple[socket.socket, ...]:
        return (self.outbound, self.inbound, *((self.hbone,) if self.hbone else ()), *self.dns_tcp)

    def every(self) -> tuple[socket.socket, ...]:
        return (*self.every_tcp(), *self.dns_udp)

    @classmethod
    def received(cls, descriptors: Sequence[int], *, hbone: bool) -> Listeners:
        """Takes over duplicates of `every` that came from another process."""
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        for one in sockets:
            one.setblocking(False)  # it is; Python cannot know
        first, rest = sockets[: 2 + hbone], sockets[2 + hbone :]
        return cls(
            outbound=first[0],
            inbound=first[1],
            dns_tcp=tuple(rest[: len(rest) // 2]),
            dns_udp=tuple(rest[len(rest) // 2 :]),
            hbone=first[2] if hbone else None,
        )


def succeeded(diag: SockDiag) -> bool:
    """Returns True if another ztunnel also listens in the namespace that `diag` asks. Raises KernelError."""
    return len(diag.listening({names.OUTBOUND_PORT})) > 1


def listen(*, hbone: bool) -> Listeners:
    """Opens the listeners; call it inside the pod's namespace. Raises OSError, and leaves no socket open then."""
    with contextlib.ExitStack() as opened:
        outbound = opened.enter_context(_dual_stack(names.OUTBOUND_PORT))
        inbound = opened.enter_context(_dual_stack(names.INBOUND_PORT))
        tunnels = opened.enter_context(_dual_stack(names.HBONE_PORT)) if hbone else None
        dns: dict[int, list[socket.socket]] = {socket.SOCK_STREAM: [], socket.SOCK_DGRAM: []}
        for kind, bound in dns.items():
            v4 = _bound(socket.AF_INET, kind, "127.0.0.1", names.DNS_PORT)
            bound.append(opened.enter_context(v4))
            with _without_ipv6():
                v6 = _bound(socket.AF_INET6, kind, "::1", names.DNS_PORT)
                bound.append(opened.enter_context(v6))
        listeners = Listeners(
            outbound=outbound,
            inbound=inbound,
            dns_tcp=tuple(dns[socket.SOCK_STREAM]),
            dns_udp=tuple(dns[socket.SOCK_DGRAM]),
            hbone=tunnels,
        )
        opened.pop_all()
        return listeners


@contextlib.contextmanager
def _without_ipv6() -> Iterator[None]:
    """Ignores errors that mean that the pod has no IPv6."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_IPV6:
            raise


def _dual_stack(port: int) -> socket.socket:
    with _without_ipv6():
        return _bound(socket.AF_INET6, socket.SOCK_STREAM, "::", port)
    return _bound(socket.AF_INET, socket.SOCK_STREAM, "0.0.0.0", port)


def _bound(family: int, kind: int, host: str, port: int) -> socket.socket:
    fresh = marked(family, kind)
    try:
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        fresh.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        if family == socket.AF_INET6:
            fresh.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::")
        fresh.bind((host, port))
        if kind == socket.SOCK_STREAM:
            fresh.listen(BACKLOG)
        program = struct.pack("@HP", 1, _RETURN_1.buffer_info()[0])  # struct sock_fprog
        fresh.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program)
    except BaseException:
        fresh.close()
        raise
    return fresh

# SPDX-License-Identifier: Apache-2.0
"""The functional self-test: the real layers in a throw-away namespace, and packets that are seen to be taken.

A rule set that the kernel took may still do nothing: rules in a table that is never used, a module without its
hook. So connections are made, as a pod and towards one, and again after removal: only what was captured with the
rules and passes without them shows that the rules do it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from time import monotonic

from agent.backends.base import PodLayer, lasting
from agent.backends.ebpf.backend import EbpfBackend
from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.programs import ProgramsBackend
from agent.backends.ebpf.ztunnels import Ztunnels
from agent.core import names
from agent.core.errors import SluiceError, StaleError
from agent.core.model.redirect import Redirect
from agent.core.wire import packet
from agent.core.wire.packet import ACK, RST, SYN, TCP, UDP, Packet
from agent.core.wire.rtnetlink import AF
from agent.kernel import scratch, scratch_link
from agent.kernel.bpf import bpffs
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.kernel.process import Process
from agent.kernel.scratch_link import LOCAL, REMOTE, Wire

_PASSES = 5  # as in a pod
_SECONDS = 2.0  # that a packet may take; it needs some microseconds
_AGAIN = 0.02
_ORIGINAL_DST = 80  # SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST
_ports = itertools.count(40000)  # of peers, each new
_LEVEL = {4: socket.IPPROTO_IP, 6: socket.IPPROTO_IPV6}


class PacketFate(Enum):
    """Fates of a packet."""

    CAPTURED = "captured"
    PASSED = "not captured"
    LOST = "seen nowhere"
    DISTORTED = "captured, but its first destination is lost"


@dataclass(frozen=True, slots=True)
class _Trial:
    """Target of a packet: the namespace, the far end of its link, and the family, 4 or 6."""

    netns: Netns
    wire: Wire
    family: int
    listening: Callable[[], None]  # called once a socket listens: some mechanisms have to know it


def selftest(active: Sequence[PodLayer], *, ipv6: bool = True, marks: bool = True) -> tuple[str, ...]:
    """Returns the failures with these layers, () when all succeeded; IPv6 is tried where the namespace has it.

    `marks` as of Redirect.

    Blocking, some 20 ms for nftables; leaves nothing behind. Raises nothing of the kernel's: refusals are findings.
    """
    try:
        # The handle outlives the thread that made the namespace: from here on it is held as a pod's is.
        inside = scratch.call(lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        with contextlib.closing(PodNetns(Netns(inside, "self-test"))) as target:
            return tuple(_run(active, target, Redirect(marks=marks).within(ipv6=ipv6 and target.has_ipv6())))
    except (SluiceError, OSError) as error:
        return (f"the self-test could not be done: {error}",)


def selftest_choice(layers: Sequence[PodLayer], pins: Pins, *, ipv6: bool = True) -> tuple[str, ...]:
    """Runs the self-test with the layers of a choice.

    In place of layers that hold their state in the node, it tries others with a state of their own next to `pins`.
    Raises KernelError if those cannot be made.
    """
    if not lasting(layers):
        return selftest(layers, ipv6=ipv6)
    with throw_away(pins) as throw_away_layers:
        return selftest(throw_away_layers, ipv6=ipv6, marks=False)


@contextlib.contextmanager
def throw_away(pins: Pins) -> Iterator[tuple[PodLayer, ...]]:
    """Yields eBPF layers with programs and maps of their own, and this process as ztunnel.

    Captured pods are not affected, since maps say which pods the programs handle. Raises KernelError.
    """
    ztunnels = Ztunnels()
    directory = pins.within(f"test-{os.getpid()}")
    ztunnels.arrived(Process(os.getpid(), os.pidfd_open(os.getpid())))
    bpffs.mount(pins.mount)
    try:
        yield ProgramsBackend(directory, ztunnels), EbpfBackend(directory, ztunnels)
    finally:
        for process in ztunnels.processes():
            process.close()
        bpffs.remove_tree(directory.root)


def _run(active: Sequence[PodLayer], target: PodNetns, want: Redirect) -> Iterator[str]:
    families = (4, 6) if want.ipv6 else (4,)
    target.netns.call(lambda: scratch_link.make(families))
    with contextlib.closing(target.netns.call(Wire)) as wire:
        wanted: list[Redirect | None] = [want]
        trials = [_Trial(target.netns, wire, family, lambda: _settle(active, target, wanted[0])) for family in families]
        _settle(active, target, want)
        failures = [failure for trial in trials for failure in _observe(trial, captured=True)]
        yield from failures
        if not failures:  # else there is nothing to be proven by their absence
            wanted[0] = None
            _settle(active, target, None)
            yield from (failure for trial in trials for failure in _observe(trial, captured=False))


def _settle(active: Sequence[PodLayer], target: PodNetns, want: Redirect | None) -> None:
    for backend in active if want else reversed(active):
        for _ in range(_PASSES):
            plan = backend.plan(want, backend.read(target))
            with contextlib.suppress(StaleError):
                backend.apply(target, plan)
            if not plan:
                break


def _observe(trial: _Trial, *, captured: bool) -> Iterator[str]:
    """Sends each kind of traffic of one family once, from new sockets, so no connection is an old one."""
    usual = PacketFate.CAPTURED if captured else PacketFate.PASSED
    when = "with" if captured else "after the removal of"
    kinds: tuple[tuple[str, Callable[[_Trial], PacketFate], PacketFate], ...] = (
        ("an outbound connection", _outbound, usual),
        ("an inbound connection", _inbound, usual),
        ("a DNS query", _query, usual),
        ("a connection of ztunnel itself", _own, PacketFate.PASSED),
    )
    for what, attempt, expected in kinds:
        fate = attempt(trial)
        if fate is not expected:
            yield f"IPv{trial.family}: {what} was {fate.value} {when} the rules"


def _outbound(trial: _Trial, mark: int = 0) -> PacketFate:
    there = (REMOTE[trial.family], 80)
    with _listener(trial, names.OUTBOUND_PORT) as listener, _client(trial, socket.SOCK_STREAM, mark) as client:
        client.connect_ex(there)
        fate = _wait(listener, trial, _leaving(client, TCP, there))
        if fate is PacketFate.CAPTURED:
            taken, _ = listener.accept()
            with taken:
                return fate if _original(taken, trial.family) == there else PacketFate.DISTORTED
        return fate


def _own(trial: _Trial) -> PacketFate:
    return _outbound(trial, names.ZTUNNEL_MARK)


def _query(trial: _Trial) -> PacketFate:
    there = (REMOTE[trial.family], 53)
    with _bound(trial, socket.SOCK_DGRAM, names.DNS_PORT) as listener, _client(trial, socket.SOCK_DGRAM) as client:
        client.sendto(b"sluice", there)
        return _wait(listener, trial, _leaving(client, UDP, there))


def _inbound(trial: _Trial) -> PacketFate:
    """Connects to port 80, where no process listens: if it answers, the connection came to the port of ztunnel."""
    here = LOCAL[trial.family]
    there = REMOTE[trial.family]
    port = next(_ports)

    def answer(seen: Packet) -> PacketFate | None:
        if seen.source != here or (seen.source_port, seen.destination_port) != (80, port):
            return None
        return (
            PacketFate.CAPTURED
            if seen.flags & (SYN | ACK) == SYN | ACK
            else PacketFate.PASSED
            if seen.flags & RST
            else None
        )

    first = packet.syn(there, port, here, 80)
    with _listener(trial, names.INBOUND_PORT):
        return _wait(None, trial, answer, lambda: trial.wire.send(trial.family, first))


def _leaving(client: socket.socket, protocol: int, there: tuple[str, int]) -> Callable[[Packet], PacketFate | None]:
    port = client.getsockname()[1]  # so that no late packet of an earlier attempt counts

    def judge(seen: Packet) -> PacketFate | None:
        observed = (seen.protocol, seen.source_port, seen.destination, seen.destination_port)
        return PacketFate.PASSED if observed == (protocol, port, *there) else None

    return judge


def _wait(
    listener: socket.socket | None,
    trial: _Trial,
    judge: Callable[[Packet], PacketFate | None],
    send: Callable[[], None] = lambda: None,
) -> PacketFate:
    """Returns the fate that shows first: a connection reaches the listener, or `judge` knows a packet on the wire.

    `send` is called now and then, as TCP does: an end of the link drops what it is given until the kernel's link
    watcher, which runs on its own, has seen that it has a carrier (noop_qdisc).
    """
    poll = select.poll()
    end = monotonic() + _SECONDS
    poll.register(trial.wire.socket, select.POLLIN)
    if listener is not None:
        poll.register(listener, select.POLLIN)
    while monotonic() < end:
        send()
        ready = {fd for fd, _ in poll.poll(_AGAIN * 1000)}
        if listener is not None and listener.fileno() in ready:
            return PacketFate.CAPTURED
        for data in trial.wire.packets():
            seen = packet.parse(data)
            if seen and (fate := judge(seen)):
                return fate
    return PacketFate.LOST


def _original(taken: socket.socket, family: int) -> tuple[str, int]:
    """Returns the original destination: struct sockaddr_in or sockaddr_in6."""
    raw = taken.getsockopt(_LEVEL[family], _ORIGINAL_DST, 28)
    address = raw[4:8] if family == 4 else raw[8:24]
    return str(ipaddress.ip_address(address)), int.from_bytes(raw[2:4])


def _bound(trial: _Trial, kind: int, port: int, address: str = "") -> socket.socket:
    sock = trial.netns.call(lambda: socket.socket(AF[trial.family], kind | socket.SOCK_CLOEXEC))
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if trial.family == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _listener(trial: _Trial, port: int) -> socket.socket:
    sock = _bound(trial, socket.SOCK_STREAM, port)
    sock.listen(8)
    trial.listening()
    return sock


def _client(trial: _Trial, kind: int, mark: int = 0) -> socket.socket:
    sock = _bound(trial, kind, 0, LOCAL[trial.family])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    return sock

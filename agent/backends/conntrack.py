# SPDX-License-Identifier: Apache-2.0
"""Sets the pod's conntrack timeouts, so that an entry lives as long as the TCP sockets of a connection, and no longer.

Rules redirect a connection by its conntrack entry. If the entry expires before TCP has ended, the next packet belongs
to no connection: an answer that comes 61 s after the question's FIN never arrives. Timeouts below LEAST are raised. If
the entry outlives its sockets, an application's SYN from the same port belongs to it, and rules drop that SYN. SHORT
lets the entry expire before the kernel repeats the SYN. The kernel's defaults: nf_conntrack_proto_tcp.c, tcp_timeouts.

A raised timeout is base + the pod's own value, so removal can restore that without a note. Only the kernel's default is
shortened, for the same reason. The kernel does not notify of changes, and reading all eight costs as much as the rest
of a pass over an unchanged pod. So they are read again only after a change by Sluice, or after BELIEVED seconds: a pod
that shortens its own is seen late.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from agent.backends.base import Support
from agent.core.errors import KernelError
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.kernel import sysctl
from agent.kernel.netlink.notifications import BELIEVED
from agent.kernel.pod_netns import PodNetns

_PREFIX: Final = "net/netfilter/nf_conntrack_tcp_timeout_"
# Both sides may be silent as long as the sockets live: at least the five days of an established connection. Raised, it
# is 11.6 days or more; the kernel's limit is 24 days at 1000 ticks a second.
_SILENT: Final = (432_000, 1_000_000)
# One side repeats a segment until it is acknowledged: longer than the 120 s between two repetitions (TCP_RTO_MAX), and
# no longer than an hour, since the entry outlives the sockets if the last packet was lost.
_REPEATED: Final = (300, 3_300)
# timeout: (least seconds, base of a raised one). By default time_wait is longer than TCP's own timeout, and syn_recv
# than its repetitions.
LEAST: Final[Mapping[str, tuple[int, int]]] = {
    "established": _SILENT,
    "close_wait": _SILENT,
    "fin_wait": _REPEATED,
    "last_ack": _REPEATED,
    "max_retrans": _REPEATED,
    "unacknowledged": _REPEATED,
}
# timeout: (the kernel's default, seconds). close: after a RST of the server; what crosses the RST (a challenge ACK)
# follows at once. syn_sent: each SYN renews it, and the kernel repeats a SYN after one second or more. Rules send the
# repeated one where they sent the first.
SHORT: Final[Mapping[str, tuple[int, int]]] = {"close": (10, 1), "syn_sent": (120, 1)}


@dataclass(frozen=True, slots=True)
class TimeoutChange:
    name: str
    seconds: int


@dataclass(frozen=True, slots=True)
class ConntrackState:
    """Seconds by timeout, () where the namespace has no conntrack or hides it. `refused`: why none can be set."""

    seconds: tuple[tuple[str, int], ...] = ()
    refused: str = ""


class ConntrackBackend:
    """Four verbs over the namespace's sysctls. A pod with sysctls that cannot be set is captured all the same."""

    name = "conntrack"
    outlives = False

    def __init__(self) -> None:
        self._refused: WeakKeyDictionary[PodNetns, str] = WeakKeyDictionary()
        self._seen: WeakKeyDictionary[PodNetns, tuple[float, tuple[tuple[str, int], ...]]] = WeakKeyDictionary()

    def probe(self) -> Support:
        return Support(True)

    def read(self, target: PodNetns) -> ConntrackState:
        until, seconds = self._seen.get(target, (0.0, ()))
        # A namespace gets its timeouts with the kernel's module; its loading is not notified either.
        if not seconds or time.monotonic() > until:
            seconds = target.netns.call(_read)
            self._seen[target] = time.monotonic() + BELIEVED, seconds
        return ConntrackState(seconds, self._refused.get(target, ""))

    def plan(self, want: Redirect | None, have: ConntrackState) -> Plan[TimeoutChange]:
        """Returns the changes; for `want` None those that restore the pod's own values."""
        changes = tuple(
            TimeoutChange(name, due)
            for name, seconds in have.seconds
            if (due := adapted(name, seconds) if want else own(name, seconds)) != seconds
        )
        if have.refused:
            remark = f"conntrack forgets half-closed connections of this pod after a minute: {have.refused}"
            return Plan(remarks=(remark,) if changes and want else ())
        steps = tuple(Step(f"sysctl -w {_PREFIX}{one.name}={one.seconds}", one) for one in changes)
        return Plan(steps, tuple(f"sysctl {_PREFIX}{one.name} is not {one.seconds}" for one in changes))

    def apply(self, target: PodNetns, plan: Plan[TimeoutChange]) -> None:
        self._seen.pop(target, None)
        try:
            target.netns.call(lambda: _write([step.payload for step in plan.steps]))
        except KernelError as error:
            self._refused[target] = str(error)


def adapted(name: str, seconds: int) -> int:
    """Returns the timeout to set when it is `seconds` now."""
    if name in SHORT:
        default, short = SHORT[name]
        return short if seconds == default else seconds
    least, base = LEAST[name]
    return seconds if seconds >= least else base + seconds


def own(name: str, seconds: int) -> int:
    """Returns the pod's own value; `seconds` itself if it was not changed."""
    if name in SHORT:
        default, short = SHORT[name]
        return default if seconds == short else seconds
    least, base = LEAST[name]
    return seconds - base if base <= seconds < base + least else seconds


def _read() -> tuple[tuple[str, int], ...]:
    timeouts = ((name, sysctl.read(_PREFIX + name)) for name in (*LEAST, *SHORT))
    return tuple((name, seconds) for name, seconds in timeouts if seconds is not None)


def _write(changes: Sequence[TimeoutChange]) -> None:
    for change in changes:
        sysctl.write(_PREFIX + change.name, change.seconds)

# SPDX-License-Identifier: Apache-2.0
"""The kernel work for one pod, on a worker thread: its namespace is found, noted and brought to the desired state."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from agent.backends.base import Lasting, PodLayer, lasting
from agent.backends.choose import Choice
from agent.core.errors import KernelError, PodEndingError, SluiceError, TeardownError
from agent.core.model.pods import Pod
from agent.core.model.port_listeners import PortListeners
from agent.core.model.preexisting import report
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket
from agent.core.policy.bridges import bridged, several
from agent.core.policy.phases import Event, Phase
from agent.kernel.pod_netns import NetnsFacts, PodNetns
from agent.reconciler.converge import Settled, due, in_the_way, settle, settle_each, verify, verify_each
from agent.reconciler.switching import NO_SWITCH, Switching, SwitchState, Wants

if TYPE_CHECKING:  # all that the first repair of a start imports delays it
    from agent.reconciler.interfaces import (
        Accounting,
        NamespaceRegistry,
        NonTcpCounter,
        PreexistingConnections,
        StaleFlows,
        ZtunnelConnections,
        ZtunnelPorts,
    )

log = logging.getLogger("sluice.enrolment")
# What the kernel answers for an interface that is down or gone, and for its files in /proc/sys.
TEARDOWN = frozenset({errno.ENETDOWN, errno.ENODEV, errno.ENXIO, errno.ENOENT})


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """The result of a pass that captured a pod.

    `preexisting` counts its connections that are older than the enrolment. `switch` is that between NAT and eBPF.
    `deferred`: accounting work is pending that must not delay the pod. `stale`: the next pass looks for stale flows.
    `to_retire`: the work for `retire`.
    """

    target: PodNetns
    want: Redirect
    done: Settled
    addresses: tuple[str, ...]
    preexisting: int
    notes: tuple[str, ...]
    switch: SwitchState
    deferred: bool
    stale: bool
    to_retire: Wants = field(default_factory=list)

    @property
    def event(self) -> Event:
        """The event of the pod's phase."""
        if self.switch.waiting:
            return Event.POSTPONED
        if self.switch:
            return Event.SWITCHED
        return Event.PRESERVED if self.preexisting else Event.CAPTURED


class Enrolment:
    """Does a pod's kernel work. Blocking; one pod at a time per thread."""

    def __init__(
        self,
        *,
        choice: Choice,
        namespaces: NamespaceRegistry,
        preexisting: PreexistingConnections,
        switching: Switching,
        non_tcp: NonTcpCounter | None,
        accounting: Accounting | None = None,
        listening: ZtunnelPorts | None = None,
        proxied: ZtunnelConnections | None = None,
        stale: StaleFlows | None = None,
        preserve: bool,
    ) -> None:
        """Takes `preserve`: pre-existing connections of a newly enrolled pod run on.

        Without `proxied` ztunnel's connections are unknown: they may hang when the rules are removed.
        """
        self._listening = listening
        self._proxied = proxied
        self._stale = stale
        self._choice = choice
        self._namespaces = namespaces
        self._preexisting = preexisting
        self._preserve = preserve
        self._switching = switching
        self._non_tcp = non_tcp
        self._accounting = accounting

    def addresses(self, pod: Pod) -> tuple[str, ...]:
        """Returns the addresses in the pod's namespace."""
        return self._namespaces.resolve(pod).addresses()

    def enrol(self, pod: Pod, redirect: Redirect, retired: tuple[PodLayer, ...], *, first: bool) -> Enrolled:
        """Applies `redirect`. Rules of the `retired` layers stay until `retire`.

        `first`: no rules capture the pod yet. Raises SluiceError; what was applied by then stays.
        """
        target = self._namespaces.resolve(pod)
        with self._running(pod, target):
            return self._enrol(pod, target, redirect, retired, first=first)

    def _enrol(
        self, pod: Pod, target: PodNetns, redirect: Redirect, retired: tuple[PodLayer, ...], *, first: bool
    ) -> Enrolled:
        # While the runtime creates its sandbox, a pod has no process: no connection begins while rules are applied.
        fresh = self._namespaces.is_new(pod)
        lenient = first and self._preserve and not fresh
        facts = self._facts(pod, target)
        want, notes = _within(redirect, facts)
        if several(facts.addresses) and not self._choice.by_socket:
            notes += bridged(want, target.wiring())
        if self._listening:
            want = self._adapted(want, self._listening.heard(target) if first else self._listening.last(target))
        if lenient:
            self._preexisting.begin(pod.uid, target)
        if first and self._accounting:
            self._accounting.enrol(pod, target, want, captured=False, fresh=fresh)
        switch = self._switching.begin(pod.uid, target, want, retired)
        # Noted and pinned before any change, so that the next agent can recover from a crash at any later point.
        self._remember(pod)
        left = () if lenient else self._preexisting.remaining(pod.uid, target)
        lax = replace(want, preserve=lenient or bool(left))
        applied, done, to_retire = self._settle(pod.uid, target, lax, retired, switch)
        if lenient or switch.begun:
            if not to_retire:
                switch = self._switching.applied(pod.uid, target, switch)
            left = self._preexisting.applied(pod.uid, target)
            if lenient and not left and not switch:
                applied, strict, _ = self._settle(pod.uid, target, want)
                done = Settled([*done.applied, *strict.applied], strict.remarks)
            self._remember(pod)
        stale = self._stale.forget(target, changed=bool(done.applied)) if self._stale and not fresh else False
        deferred = False
        if self._accounting:
            deferred = self._accounting.enrol(pod, target, want, captured=True, fresh=fresh)
            notes += self._accounting.returned(target)
        remarks = dict.fromkeys((*notes, report(left), self._switching.report(switch), *done.remarks))
        remarks.pop("", None)
        return Enrolled(
            target=target,
            want=applied,
            done=done,
            addresses=facts.addresses,
            preexisting=len(left),
            notes=tuple(remarks),
            switch=switch,
            deferred=deferred,
            stale=stale,
            to_retire=to_retire,
        )

    def retire(self, pod: Pod, enrolled: Enrolled) -> Enrolled:
        """Clears or drains the retired layers. Call it after packets under way have passed (kernel.grace).

        Raises SluiceError; the next pass then finds what is left.
        """
        with self._running(pod, enrolled.target):
            done = settle_each(enrolled.target, enrolled.to_retire)
        switch = enrolled.switch
        if switch.begun:
            switch = self._switching.applied(pod.uid, enrolled.target, switch)
            self._remember(pod)
        remarks = dict.fromkeys((*enrolled.notes, self._switching.report(switch), *done.remarks))
        remarks.pop("", None)
        applied = Settled([*enrolled.done.applied, *done.applied], enrolled.done.remarks + done.remarks)
        return replace(enrolled, done=applied, switch=switch, notes=tuple(remarks), to_retire=[])

    def _settle(
        self,
        uid: str,
        target: PodNetns,
        want: Redirect,
        retired: tuple[PodLayer, ...] = (),
        switch: SwitchState = NO_SWITCH,
    ) -> tuple[Redirect, Settled, Wants]:
        """Returns the want of the active layers, what was done, and the work that is left in the retired layers."""
        want, wants = self._switching.wants(
            target, want, retired, switching=bool(switch), forwards=self._forwards(target), waiting=switch.waiting
        )
        if self._non_tcp:
            self._non_tcp.count(uid, target, want)
        later = () if switch.waiting else retired  # retired layers capture on while the switch waits
        done = settle_each(target, [one for one in wants if one[0] not in later])
        return want, done, due(target, [one for one in wants if one[0] in later])

    def adapted(self, enrolled: Enrolled) -> Redirect:
        """Returns the want for the listeners that were last seen in the pod. Raises KernelError."""
        if self._listening is None:
            return enrolled.want
        return self._adapted(enrolled.want, self._listening.last(enrolled.target))

    def _adapted(self, want: Redirect, listeners: PortListeners) -> Redirect:
        """Adapts ports for rules: only they redirect to a port; programs know ztunnel's sockets (Choice.by_socket)."""
        return replace(want, hbone=listeners.hbone, blocked=bool(listeners.taken) and not self._choice.by_socket)

    def again(self, pod: Pod, enrolled: Enrolled, want: Redirect) -> tuple[Redirect, Settled]:
        """Adapts the rules to sockets that were opened or closed in the pod (Choice.by_socket, `adapted`)."""
        with self._running(pod, enrolled.target):
            done = settle(enrolled.target, want, self._choice.active)
        if self._accounting:
            self._accounting.enrol(pod, enrolled.target, want, captured=True)
        return want, done

    def leave(self, pod: Pod, redirect: Redirect) -> tuple[Settled, tuple[TcpSocket, ...]]:
        """Stops the capture of new connections; returns also the connections that ztunnel still proxies.

        `redirect`: how the pod was captured. Connections older than the enrolment run on. Raises SluiceError.
        """
        self._preexisting.forget(pod.uid)
        self._switching.forget(pod.uid)
        target = self._namespaces.resolve(pod)
        if self._accounting:
            self._accounting.release(pod.uid, target)
        want, _ = _within(redirect, self._facts(pod, target))
        with self._running(pod, target):
            done = settle_each(target, self._switching.leaving(target, want))
        return done, self._proxied.there(target) if self._proxied else ()

    def unenrol(self, pod: Pod) -> Settled:
        """Resets the connections that ztunnel still proxies, or both ends would hang, then removes all rules."""
        target = self._namespaces.resolve(pod)
        if self._proxied:
            try:
                self._proxied.reset(target)
            except SluiceError as error:
                log.warning("pod %s: cannot reset connections through ztunnel, they may hang: %s", pod.key, error)
        with self._running(pod, target):
            return settle(target, None, self._choice.active, self._choice.retired)

    def compare(
        self,
        pod: Pod,
        redirect: Redirect | None,
        *,
        phase: Phase,
        preserve: bool,
        foreign: bool = False,
    ) -> dict[str, tuple[tuple[str, ...], str]]:
        """Returns the drift per layer: (differences, repair script); changes nothing.

        `redirect` is how the pod is captured in this phase, `preserve` says that pre-existing connections run on.
        `foreign` as in Reconciler.inspect.
        """
        target = self._namespaces.resolve(pod)
        retired = self._choice.retired
        if redirect is None:
            return verify(target, None, self._choice.active, retired)
        want, _ = _within(redirect, target.facts())
        if phase.drains:
            return verify_each(target, self._switching.leaving(target, want))
        listeners = self._listening.heard(target) if self._listening else PortListeners()
        want, wants = self._switching.wants(
            target,
            self._adapted(replace(want, preserve=preserve), listeners),
            retired,
            switching=phase in (Phase.POSTPONED, Phase.DRAINING),
            forwards=self._forwards(target),
            waiting=phase is Phase.POSTPONED,
        )
        if self._non_tcp:
            self._non_tcp.count(pod.uid, target, want, now=True)
        drift = verify_each(target, wants)
        silent = (f"nothing listens on {', '.join(map(str, listeners.missing))}",) if listeners.missing else ()
        if silent or listeners.foreign:
            drift["ztunnel"] = ((*silent, *listeners.foreign), "")
        if foreign and (lines := self._foreign(target, want, wants)):
            drift["foreign"] = (lines, "")
        return drift

    def _foreign(self, target: PodNetns, want: Redirect, wants: Wants) -> tuple[str, ...]:
        """Returns other programs' rules that take traffic first, and new connections that do not reach ztunnel."""
        lines = in_the_way(target, wants)
        if self._listening and not want.draining:
            lines += self._listening.astray(target, want, by_socket=self._choice.by_socket)
        return lines + self._accounting.returned(target) if self._accounting else lines

    def forget(self, pod: Pod) -> None:
        """Notes that the pod is not captured."""
        self._namespaces.remember(pod, captured=False)

    def release(self, uid: str) -> None:
        """Removes what outlives the namespace of a pod that is gone."""
        self._preexisting.forget(uid)
        self._switching.forget(uid)
        if self._non_tcp:
            self._non_tcp.forget(uid)
        target = self._namespaces.opened(uid)
        if self._accounting:
            self._accounting.release(uid, target)
        if target is not None:
            try:
                settle_each(target, [(one, None) for one in self.lasting])
            except SluiceError as error:
                log.warning("pod %s is gone: cannot remove its state on the node before the next sweep: %s", uid, error)
        self._namespaces.release(uid)

    @property
    def lasting(self) -> tuple[Lasting, ...]:
        """The layers with state that outlives a pod, in the order of removal."""
        return lasting((*reversed(self._choice.active), *self._choice.retired))

    def _facts(self, pod: Pod, target: PodNetns) -> NetnsFacts:
        """Returns the facts of the namespace; sets lo up in a new sandbox, as the runtime's own plugin may do so later.

        Raises KernelError; PodEndingError where the runtime has set lo down, its first step when it ends a sandbox.
        """
        facts = target.facts()
        if facts.up:
            return facts
        if self._namespaces.is_new(pod):
            target.route.raise_lo()
            return target.facts()
        if not self._namespaces.occupied(target):
            raise PodEndingError(f"pod {pod.key} is ending: lo is down, and no process is left in its namespace")
        return facts

    @contextlib.contextmanager
    def _running(self, pod: Pod, target: PodNetns) -> Iterator[None]:
        """Wraps changes: raises PodEndingError for a failure in a sandbox that has begun to end.

        Raises TeardownError if that is not certain: a process may outlive the interfaces by a moment.
        """
        try:
            yield
        except KernelError as error:
            if self._facts(pod, target).up and error.errno not in TEARDOWN:
                raise
            raise TeardownError(error) from error

    def _forwards(self, target: PodNetns) -> bool:
        """Returns whether the pod forwards packets. Matters only to eBPF: rules see forwarded packets, too."""
        return self._choice.by_socket and target.wiring().forwards

    def _remember(self, pod: Pod) -> None:
        preexisting = tuple(self._preexisting.as_note(pod.uid))
        preswitch = self._switching.as_note(pod.uid)
        self._namespaces.remember(pod, captured=True, preexisting=preexisting, preswitch=preswitch)


def _within(redirect: Redirect, facts: NetnsFacts) -> tuple[Redirect, tuple[str, ...]]:
    """Returns the part of the intent that this namespace can hold, and notes for the user."""
    want = redirect.within(ipv6=facts.ipv6)
    if not want.dns or (facts.loopback4 and (facts.loopback6 or not facts.ipv6)):
        return want, ()
    note = f"lo lacks {'::1' if facts.loopback4 else '127.0.0.1'}, where ztunnel takes DNS: DNS is not captured"
    return replace(want, dns=False), (note,)

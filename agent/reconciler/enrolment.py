"""One pod's kernel work, for a worker thread: its namespace is found, noted and made as it should be."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from agent.backends.base import Backend, Lasting, lasting
from agent.backends.choose import Choice
from agent.core.errors import KernelError, PodEndingError, SluiceError
from agent.core.model.listeners import PortListeners
from agent.core.model.pods import Pod
from agent.core.model.preexisting import report
from agent.core.model.redirect import Redirect
from agent.core.model.sockets import TcpSocket
from agent.core.policy.bridges import bridged, several
from agent.kernel.pod_netns import NetnsFacts, PodNetns
from agent.reconciler.converge import Settled, due, in_the_way, settle, settle_each, verify, verify_each
from agent.reconciler.interfaces import (
    Accounting,
    NamespaceRegistry,
    NonTcpCounter,
    PreexistingConnections,
    ZtunnelConnections,
    ZtunnelPorts,
)
from agent.reconciler.switching import NOTHING_CARRIED, Switching, SwitchState, Wants

log = logging.getLogger("sluice.enrolment")


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What a pass over a captured pod found and did. `first`: the pod was not captured before.

    `carried` is of a change between NAT and eBPF. `soon`: something is left that nobody should wait for. `old`: what
    `retire` has to do.
    """

    target: PodNetns
    want: Redirect
    done: Settled
    addresses: tuple[str, ...]
    outside: int
    notes: tuple[str, ...]
    first: bool
    carried: SwitchState
    soon: bool
    old: Wants = field(default_factory=list)

    @property
    def changing(self) -> bool:
        """What captured it before is not all gone yet."""
        return bool(self.carried)

    @property
    def waiting(self) -> bool:
        """What captured it before is not gone at all."""
        return self.carried.waiting


class Enrolment:
    """Blocking; one pod at a time per thread."""

    def __init__(
        self,
        choice: Choice,
        namespaces: NamespaceRegistry,
        outside: PreexistingConnections,
        switching: Switching,
        counting: NonTcpCounter | None,
        accounting: Accounting | None = None,
        listening: ZtunnelPorts | None = None,
        proxied: ZtunnelConnections | None = None,
        *,
        preserve: bool,
    ) -> None:
        """`preserve`: connections from before a pod's enrolment run on.

        Without `proxied` nothing is known of ztunnel's connections: they may hang when the rules go.
        """
        self._listening = listening
        self._proxied = proxied
        self._choice = choice
        self._namespaces = namespaces
        self._outside = outside
        self._preserve = preserve
        self._switching = switching
        self._counting = counting
        self._accounting = accounting

    def addresses(self, pod: Pod) -> tuple[str, ...]:
        """The pod's addresses as its namespace has them."""
        return self._namespaces.resolve(pod).addresses()

    def runs(self, pod: Pod, *, leaving: bool) -> bool:
        """Whether the pod is running and not captured, or `leaving`. Does not block."""
        return (leaving or not self._namespaces.was_captured(pod.uid)) and not self._namespaces.is_new(pod)

    def enrol(self, pod: Pod, redirect: Redirect, retired: tuple[Backend, ...], *, leaving: bool = False) -> Enrolled:
        """Makes `redirect` true. What the `retired` layers hold stays until `retire`.

        `leaving`: capture of the pod was about to end. Raises SluiceError; what was applied until then stays.
        """
        target = self._namespaces.resolve(pod)
        with self._running(pod, target):
            return self._enrol(pod, target, redirect, retired, leaving=leaving)

    def _enrol(
        self, pod: Pod, target: PodNetns, redirect: Redirect, retired: tuple[Backend, ...], *, leaving: bool
    ) -> Enrolled:
        first = leaving or not self._namespaces.was_captured(pod.uid)
        # A pod whose sandbox is just being made has no process yet, so nothing can begin while the rules come.
        fresh = self._namespaces.is_new(pod)
        lenient = first and self._preserve and not fresh
        facts = self._facts(pod, target)
        want, notes = _within(redirect, facts)
        if several(facts.addresses) and not self._choice.by_socket:
            notes += bridged(want, target.wiring())
        if self._listening:
            want = self._adapted(want, self._listening.heard(target) if first else self._listening.last(target))
        if lenient:
            self._outside.begin(pod.uid, target)
        if first and self._accounting:
            self._accounting.enrol(pod, target, want, captured=False, fresh=fresh)
        carried = self._switching.begin(pod.uid, target, want, retired)
        # Noted and pinned before anything is changed: a crash at any later point finds its way back.
        self._remember(pod)
        left = () if lenient else self._outside.remaining(pod.uid, target)
        lax = replace(want, preserve=lenient or bool(left))
        now, done, old = self._settle(pod.uid, target, lax, retired, carried)
        if lenient or carried.fresh:
            if not old:
                carried = self._switching.applied(pod.uid, target, carried)
            left = self._outside.applied(pod.uid, target)
            if lenient and not left and not carried:
                now, strict, _ = self._settle(pod.uid, target, want)
                done = Settled([*done.applied, *strict.applied], strict.remarks)
            self._remember(pod)
        soon = False
        if self._accounting:
            soon = self._accounting.enrol(pod, target, want, captured=True, fresh=fresh)
            notes += self._accounting.returned(target)
        words = dict.fromkeys((*notes, report(left), self._switching.told(carried), *done.remarks))
        words.pop("", None)
        return Enrolled(target, now, done, facts.addresses, len(left), tuple(words), first, carried, soon, old)

    def retire(self, pod: Pod, found: Enrolled) -> Enrolled:
        """Clears or drains the retired layers. Before it, packets under way must have passed (kernel.grace).

        Raises SluiceError. The next pass then finds what is left.
        """
        done = settle_each(found.target, found.old)
        carried = found.carried
        if carried.fresh:
            carried = self._switching.applied(pod.uid, found.target, carried)
            self._remember(pod)
        words = dict.fromkeys((*found.notes, self._switching.told(carried), *done.remarks))
        words.pop("", None)
        applied = Settled([*found.done.applied, *done.applied], found.done.remarks + done.remarks)
        return replace(found, done=applied, carried=carried, notes=tuple(words), old=[])

    def _settle(
        self,
        uid: str,
        target: PodNetns,
        want: Redirect,
        retired: tuple[Backend, ...] = (),
        carried: SwitchState = NOTHING_CARRIED,
    ) -> tuple[Redirect, Settled, Wants]:
        """Also what the active layers were to make true, and what is left to do in the retired ones."""
        want, wants = self._switching.wants(
            target, want, retired, carried=bool(carried), forwards=self._forwards(target), waiting=carried.waiting
        )
        if self._counting:
            self._counting.count(uid, target, want)
        later = () if carried.waiting else retired  # while it waits these layers capture on
        done = settle_each(target, [one for one in wants if one[0] not in later])
        return want, done, due(target, [one for one in wants if one[0] in later])

    def adapted(self, found: Enrolled) -> Redirect:
        """The intent with what was heard last of the listeners in the pod. Raises KernelError."""
        return self._adapted(found.want, self._listening.last(found.target)) if self._listening else found.want

    def _adapted(self, want: Redirect, heard: PortListeners) -> Redirect:
        """Only rules redirect to a port; programs know ztunnel's sockets (Choice.by_socket)."""
        return replace(want, hbone=heard.hbone, blocked=bool(heard.taken) and not self._choice.by_socket)

    def again(self, pod: Pod, found: Enrolled, want: Redirect) -> tuple[Redirect, Settled]:
        """Adapts the rules to sockets that were opened or closed in the pod (Choice.by_socket, `adapted`)."""
        with self._running(pod, found.target):
            done = settle(found.target, want, self._choice.active)
        if self._accounting:
            self._accounting.enrol(pod, found.target, want, captured=True)
        return want, done

    def leave(self, pod: Pod, redirect: Redirect) -> tuple[Settled, tuple[TcpSocket, ...]]:
        """Stops the capture of new connections, and returns those that ztunnel still carries.

        `redirect`: how the pod was captured. Connections from before the enrolment run on. Raises SluiceError.
        """
        self._outside.forget(pod.uid)
        self._switching.forget(pod.uid)
        target = self._namespaces.resolve(pod)
        if self._accounting:
            self._accounting.release(pod.uid, target)
        want, _ = _within(redirect, self._facts(pod, target))
        with self._running(pod, target):
            done = settle_each(target, self._switching.leaving(target, want))
        return done, self._proxied.there(target) if self._proxied else ()

    def unenrol(self, pod: Pod) -> Settled:
        """Removes all rules. Connections that ztunnel still carries are reset before, or both ends would hang."""
        target = self._namespaces.resolve(pod)
        if self._proxied:
            try:
                self._proxied.reset(target)
            except SluiceError as error:
                log.warning("pod %s: connections through ztunnel may hang: %s", pod.key, error)
        return settle(target, None, self._choice.active, self._choice.retired)

    def compare(
        self,
        pod: Pod,
        redirect: Redirect | None,
        *,
        leaving: Redirect | None,
        preserve: bool,
        changing: bool,
        foreign: bool = False,
    ) -> dict[str, tuple[tuple[str, ...], str]]:
        """What is not as it should be, per layer; changes nothing.

        `leaving`: how a pod was captured that leaves. `foreign` as of Reconciler.inspect.
        """
        target = self._namespaces.resolve(pod)
        retired = self._choice.retired
        if leaving is not None:
            return verify_each(target, self._switching.leaving(target, _within(leaving, target.facts())[0]))
        if redirect is None:
            return verify(target, None, self._choice.active, retired)
        heard = self._listening.heard(target) if self._listening else PortListeners()
        want = self._adapted(replace(_within(redirect, target.facts())[0], preserve=preserve), heard)
        want, wants = self._switching.wants(target, want, retired, carried=changing, forwards=self._forwards(target))
        if self._counting:
            self._counting.count(pod.uid, target, want, now=True)
        found = verify_each(target, wants)
        silent = (f"nothing listens on {', '.join(map(str, heard.missing))}",) if heard.missing else ()
        if silent or heard.foreign:
            found["ztunnel"] = ((*silent, *heard.foreign), "")
        if foreign and (lines := self._foreign(target, want, wants)):
            found["foreign"] = (lines, "")
        return found

    def _foreign(self, target: PodNetns, want: Redirect, wants: Wants) -> tuple[str, ...]:
        """Others' rules that take traffic before ours, and new connections that do not reach ztunnel."""
        lines = in_the_way(target, wants)
        if self._listening and not want.draining:
            lines += self._listening.astray(target, want, by_socket=self._choice.by_socket)
        return lines + self._accounting.returned(target) if self._accounting else lines

    def forget(self, pod: Pod) -> None:
        """The pod is not captured, and that is noted."""
        self._namespaces.remember(pod, captured=False)

    def release(self, uid: str) -> None:
        """The pod is gone. What does not go with its namespace is taken away."""
        self._outside.forget(uid)
        self._switching.forget(uid)
        if self._counting:
            self._counting.forget(uid)
        target = self._namespaces.opened(uid)
        if self._accounting:
            self._accounting.release(uid, target)
        if target is not None:
            try:
                settle_each(target, [(one, None) for one in self.lasting])
            except SluiceError as error:
                log.warning("pod %s is gone, and what the node holds of it stays until the next sweep: %s", uid, error)
        self._namespaces.release(uid)

    @property
    def lasting(self) -> tuple[Lasting, ...]:
        """Layers whose state outlives a pod, in the order of removal."""
        return lasting((*reversed(self._choice.active), *self._choice.retired))

    def _facts(self, pod: Pod, target: PodNetns) -> NetnsFacts:
        """Sets lo up in a new sandbox, for the runtime's own plugin may do so later.

        Raises KernelError; PodEndingError where the runtime has set lo down, with which it begins to end a sandbox.
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
        """Around changes: what fails because the sandbox has begun to end meanwhile raises PodEndingError."""
        try:
            yield
        except KernelError:
            self._facts(pod, target)
            raise

    def _forwards(self, target: PodNetns) -> bool:
        """Of no matter to rules, which see what is forwarded, too."""
        return self._choice.by_socket and target.wiring().forwards

    def _remember(self, pod: Pod) -> None:
        outside = tuple(self._outside.as_note(pod.uid))
        carried = self._switching.as_note(pod.uid)
        self._namespaces.remember(pod, captured=True, outside=outside, carried=carried)


def _within(redirect: Redirect, facts: NetnsFacts) -> tuple[Redirect, tuple[str, ...]]:
    """What of the intent can be true in a namespace like this, and what people should know of it."""
    want = redirect.within(ipv6=facts.ipv6)
    if not want.dns or (facts.loopback4 and (facts.loopback6 or not facts.ipv6)):
        return want, ()
    note = f"lo lacks {'::1' if facts.loopback4 else '127.0.0.1'}, where ztunnel takes DNS: DNS is not captured"
    return replace(want, dns=False), (note,)

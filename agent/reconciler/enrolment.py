"""One pod's kernel work, for a worker thread: its namespace is found, noted and made as it should be."""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.backends.base import Backend
from agent.backends.choose import Choice
from agent.core.outside import report
from agent.core.pods import Pod
from agent.core.redirect import Redirect
from agent.kernel.podnetns import Facts, PodNetns
from agent.reconciler.parts import Counting, Namespaces, Outside
from agent.reconciler.settle import Settled, settle, verify


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What a pass over a captured pod found and did. `first`: the pod was not captured before."""

    target: PodNetns
    want: Redirect
    done: Settled
    addresses: tuple[str, ...]
    outside: int
    notes: tuple[str, ...]
    first: bool


class Enrolment:
    """Blocking; one pod at a time per thread."""

    def __init__(
        self, choice: Choice, namespaces: Namespaces, outside: Outside, counting: Counting | None, *, preserve: bool
    ) -> None:
        """`preserve`: connections from before a pod's enrolment run on."""
        self._choice, self._namespaces, self._outside, self._preserve = choice, namespaces, outside, preserve
        self._counting = counting

    def addresses(self, pod: Pod) -> tuple[str, ...]:
        """The pod's addresses as its namespace has them."""
        return self._namespaces.resolve(pod).addresses()

    def enrol(self, pod: Pod, redirect: Redirect, retired: tuple[Backend, ...]) -> Enrolled:
        """Makes `redirect` true. Raises SluiceError; what was applied until then stays."""
        target, first = self._namespaces.resolve(pod), not self._namespaces.was_captured(pod.uid)
        # A pod whose sandbox is just being made has no process yet, so nothing can begin while the rules come.
        lenient = first and self._preserve and not self._namespaces.is_new(pod)
        if lenient:
            self._outside.begin(pod.uid, target)
        # Noted and pinned before anything is changed: a crash at any later point finds its way back.
        self._remember(pod)
        facts = target.facts()
        want, notes = _within(redirect, facts)
        left = () if lenient else self._outside.remaining(pod.uid, target)
        done = self._settle(pod.uid, target, replace(want, preserve=lenient or bool(left)), retired)
        if lenient:
            left = self._outside.applied(pod.uid, target)
            if not left:
                strict = self._settle(pod.uid, target, want)
                done = Settled([*done.applied, *strict.applied], strict.remarks)
            self._remember(pod)
        words = tuple(line for line in (*notes, report(left), *done.remarks) if line)
        want = replace(want, preserve=bool(left))
        return Enrolled(target, want, done, facts.addresses, len(left), words, first)

    def _settle(self, uid: str, target: PodNetns, want: Redirect, retired: tuple[Backend, ...] = ()) -> Settled:
        if self._counting:
            self._counting.count(uid, target, want)
        return settle(target, want, self._choice.active, retired)

    def unenrol(self, pod: Pod) -> Settled:
        """Takes all of ours away; connections from before the enrolment run on."""
        self._outside.forget(pod.uid)
        return settle(self._namespaces.resolve(pod), None, self._choice.active, self._choice.retired)

    def compare(self, pod: Pod, redirect: Redirect | None, preserve: bool) -> dict[str, tuple[tuple[str, ...], str]]:
        """What is not as it should be, per layer; changes nothing."""
        target = self._namespaces.resolve(pod)
        want = None
        if redirect is not None:
            want = replace(_within(redirect, target.facts())[0], preserve=preserve)
            if self._counting:
                self._counting.count(pod.uid, target, want, now=True)
        return verify(target, want, self._choice.active, self._choice.retired)

    def forget(self, pod: Pod) -> None:
        """The pod is not captured, and that is noted."""
        self._namespaces.remember(pod, captured=False)

    def release(self, uid: str) -> None:
        self._outside.forget(uid)
        if self._counting:
            self._counting.forget(uid)
        self._namespaces.release(uid)

    def _remember(self, pod: Pod) -> None:
        self._namespaces.remember(pod, captured=True, outside=tuple(self._outside.as_note(pod.uid)))


def _within(redirect: Redirect, facts: Facts) -> tuple[Redirect, tuple[str, ...]]:
    """What of the intent can be true in a namespace like this, and what people should know of it."""
    want = redirect.within(ipv6=facts.ipv6)
    if not want.dns or (facts.loopback4 and (facts.loopback6 or not facts.ipv6)):
        return want, ()
    note = f"lo lacks {'::1' if facts.loopback4 else '127.0.0.1'}, where ztunnel takes DNS: DNS is not captured"
    return replace(want, dns=False), (note,)

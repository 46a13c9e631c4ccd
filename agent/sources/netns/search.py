# SPDX-License-Identifier: Apache-2.0
"""Finds the network namespaces of pods that no CNI call announced: the agent came later, or ADD never reached it.

A process is assigned to a pod by its cgroup. Of several namespaces, the pod's is chosen by its addresses, then by a
mount of the runtime, then by the age of its processes. The host's, or one that may be another pod's, is never taken.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from agent.core.errors import ForeignNetnsError, HostNetnsError, KernelError, NetnsError, SluiceError
from agent.kernel.netns import Netns, NetnsId
from agent.sources.netns.candidates import Candidate, Candidates

NETNS_DIRS = ("/run/netns", "/var/run/netns")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A pod to look for. `containers` are ids without the runtime's scheme; `addresses` are those of its status."""

    uid: str
    containers: Collection[str] = ()
    addresses: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """An open handle for the caller to close, a path to it while the pod lives, and the reason of the choice."""

    netns: Netns
    path: str
    how: str


def find(
    uid: str,
    containers: Collection[str],
    addresses: Collection[str],
    netns_dirs: Sequence[str] = NETNS_DIRS,
    proc: str = "/proc",
) -> Found:
    """Searches for one pod; see `search`. Raises the error that `search` returns."""
    found = search([Wanted(uid, containers, addresses)], netns_dirs, proc)[uid]
    if isinstance(found, SluiceError):
        raise found
    return found


def search(
    wanted: Iterable[Wanted], netns_dirs: Sequence[str] = NETNS_DIRS, proc: str = "/proc"
) -> Mapping[str, Found | SluiceError]:
    """Returns for each UID its namespace, or an error. Reads /proc once for all. Blocking: not for the event loop.

    HostNetnsError: its processes are in the host's namespace alone. ForeignNetnsError: the namespace is not proven to
    be the pod's, or went away meanwhile. KernelError: it has processes in unreadable namespaces. A plain NetnsError:
    the pod has nothing on this node. Raises KernelError if the host's namespace cannot be read from /proc.
    """
    pods = list(wanted)
    node = Candidates({container: pod.uid for pod in pods for container in pod.containers}, netns_dirs, proc)
    try:
        return _each_once({pod.uid: _answer(node, pod) for pod in pods})
    finally:
        node.close()


def lives(known: NetnsId, netns_dirs: Sequence[str] = NETNS_DIRS, proc: str = "/proc") -> bool:
    """Returns True if a process or a mount still holds this namespace. Blocking."""
    node = Candidates({}, netns_dirs, proc)
    try:
        return node.has((known.device, known.inode))
    finally:
        node.close()


def _each_once(answers: Mapping[str, tuple[Candidate, str] | SluiceError]) -> dict[str, Found | SluiceError]:
    """Refuses a namespace that matches several pods."""
    takers: dict[int, list[str]] = {}
    for uid, answer in answers.items():
        if not isinstance(answer, SluiceError):
            takers.setdefault(id(answer[0]), []).append(uid)
    given: dict[str, Found | SluiceError] = {}
    for uid, answer in answers.items():
        if isinstance(answer, SluiceError):
            given[uid] = answer
            continue
        space, how = answer
        if len(takers[id(space)]) > 1:
            names = " and ".join(sorted(takers[id(space)]))
            given[uid] = ForeignNetnsError(f"{space} may be that of pods {names}; not touching it")
            continue
        try:
            netns = space.take()
            given[uid] = Found(netns, netns.origin, how)
        except SluiceError as problem:
            given[uid] = ForeignNetnsError(f"pod {uid}: {problem}")
    return given


def _answer(node: Candidates, pod: Wanted) -> tuple[Candidate, str] | SluiceError:
    mine = node.of(pod.uid)
    try:
        space, why = _by_address(node, pod, mine) if pod.addresses else _by_age(pod, mine)
    except NetnsError as problem:
        return problem
    if space is None:
        return _nothing(node, pod, mine, why)
    seen = space.owners.get(pod.uid)
    return space, f"process {seen[0].pid} of the pod is in it and {why}" if seen else why


def _by_address(node: Candidates, pod: Wanted, mine: Sequence[Candidate]) -> tuple[Candidate | None, str]:
    """Chooses a namespace with a process and an address of the pod; else a mount without a pod's process.

    The pod can make more namespaces and give them its address, but cannot mount them where the runtime does.
    """
    addresses = _plain(pod.addresses)
    holding = [space for space in mine if addresses & space.addresses()]
    holding = holding or [space for space in node.mounted() if addresses & space.addresses()]
    strange = [] if holding or mine else [space for space in node.strange() if addresses & space.addresses()]
    if strange:
        raise ForeignNetnsError(
            f"pod {pod.uid}: {strange[0]} has one of the pod's addresses, but belongs to unknown containers"
        )
    if not holding:
        return None, f"holds none of its addresses ({', '.join(sorted(addresses))})"
    chosen = _only([space for space in holding if space.mount]) or _only(holding)
    if chosen is None:
        words = " and ".join(map(str, holding))
        raise ForeignNetnsError(f"pod {pod.uid}: {words} have an address of it; cannot decide which is the pod's")
    return chosen, f"it holds {', '.join(sorted(addresses & chosen.addresses()))}"


def _by_age(pod: Wanted, mine: Sequence[Candidate]) -> tuple[Candidate | None, str]:
    """Chooses without a known address: one with this pod's processes alone; the mounted one, else the oldest's."""
    alone = [space for space in mine if len(space.owners) == 1]
    if not alone:
        return None, "has processes of others too, and no address of the pod is known yet"
    if mounted := _only([space for space in alone if space.mount]):
        return mounted, "it is the one that is mounted"
    if len(alone) == 1:
        return alone[0], "no other has one"
    (oldest, first), (next_oldest, second), *_ = sorted(((space.age(pod.uid), space) for space in alone), key=_age)
    if oldest == next_oldest:
        raise ForeignNetnsError(
            f"pod {pod.uid}: {first} and {second} are equally old; cannot decide which is the pod's"
        )
    return first, "it is that of its oldest process"


def _age(aged: tuple[int, Candidate]) -> int:
    return aged[0]


def _nothing(node: Candidates, pod: Wanted, mine: Sequence[Candidate], wrong: str) -> SluiceError:
    if mine:
        problems = [f"{space}: {space.problem}" for space in mine if space.problem]
        words = "; ".join(problems) or f"{' and '.join(map(str, mine))} {wrong}"
        return ForeignNetnsError(f"pod {pod.uid}: {words}; not touching it")
    if (pid := node.astray().get(pod.uid)) is not None:
        words = f"its process {pid} is in the host's network namespace"
        return HostNetnsError(f"pod {pod.uid}: {words}, and no other one was found")
    if (pid := node.hidden.get(pod.uid)) is not None:
        words = f"Permission denied; the agent needs CAP_SYS_PTRACE, and pod {pod.uid} has that process"
        return KernelError(f"look up the network namespace of process {pid}", errno.EPERM, words)
    return NetnsError(
        f"pod {pod.uid}: no network namespace found (no process or mount on this node could be matched to it)"
    )


def _plain(addresses: Collection[str]) -> frozenset[str]:
    """Normalises addresses as ipaddress writes them; invalid ones are left out."""
    found = set()
    for word in addresses:
        with contextlib.suppress(ValueError):
            found.add(str(ipaddress.ip_address(word)))
    return frozenset(found)


def _only(found: Sequence[Candidate]) -> Candidate | None:
    return found[0] if len(found) == 1 else None

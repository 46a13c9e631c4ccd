# SPDX-License-Identifier: Apache-2.0
"""Finds the network namespaces of pods that no CNI call announced: the agent came later, or ADD never reached it.

A process is assigned to a pod by its cgroup. Of several namespaces, the pod's is chosen by its addresses, then by a
mount of the runtime, then by the age of its processes. The host's, or one that may be another pod's, is never taken.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
from collections.abc import Collection, Mapping, Sequence

from agent.core.errors import ForeignNetnsError, HostNetnsError, KernelError, NetnsError, SluiceError
from agent.core.model.pods import Pod
from agent.kernel.netns import Netns, NetnsId
from agent.sources.netns.candidates import Candidate, Candidates

NETNS_DIRS = ("/run/netns", "/var/run/netns")


def search(
    pods: Sequence[Pod], netns_dirs: Sequence[str] = NETNS_DIRS, proc: str = "/proc"
) -> Mapping[str, Netns | SluiceError]:
    """Returns for each UID its namespace, for the caller to close, or an error. Blocking: not for the event loop.

    Reads /proc once for all. HostNetnsError: its processes are in the host's namespace alone. ForeignNetnsError: the
    namespace is not proven to be the pod's, or went away meanwhile. KernelError: it has processes in unreadable
    namespaces. A plain NetnsError: the pod has nothing on this node. Raises KernelError if the host's namespace cannot
    be read from /proc.
    """
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


def _each_once(answers: Mapping[str, Candidate | SluiceError]) -> dict[str, Netns | SluiceError]:
    """Refuses a namespace that matches several pods."""
    takers: dict[int, list[str]] = {}
    for uid, answer in answers.items():
        takers.setdefault(id(answer), []).append(uid)
    given: dict[str, Netns | SluiceError] = {}
    for uid, answer in answers.items():
        if isinstance(answer, SluiceError):
            given[uid] = answer
        elif len(takers[id(answer)]) > 1:
            names = " and ".join(sorted(takers[id(answer)]))
            given[uid] = ForeignNetnsError(f"{answer} may be that of pods {names}; not touching it")
        else:
            try:
                given[uid] = answer.take()
            except SluiceError as problem:
                given[uid] = ForeignNetnsError(f"pod {uid}: {problem}")
    return given


def _answer(node: Candidates, pod: Pod) -> Candidate | SluiceError:
    mine = node.of(pod.uid)
    try:
        return (_by_address(node, pod, mine) if pod.addresses else _by_age(pod, mine)) or _nothing(node, pod, mine)
    except NetnsError as problem:
        return problem


def _by_address(node: Candidates, pod: Pod, mine: Sequence[Candidate]) -> Candidate | None:
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
        return None
    chosen = _only([space for space in holding if space.mount]) or _only(holding)
    if chosen is None:
        holders = " and ".join(map(str, holding))
        raise ForeignNetnsError(f"pod {pod.uid}: {holders} have an address of it; cannot decide which is the pod's")
    return chosen


def _by_age(pod: Pod, mine: Sequence[Candidate]) -> Candidate | None:
    """Chooses without a known address: one with this pod's processes alone; the mounted one, else the oldest's."""
    alone = [space for space in mine if len(space.owners) == 1]
    if chosen := _only(alone) or _only([space for space in alone if space.mount]):
        return chosen
    if not alone:
        return None
    (oldest, first), (next_oldest, second), *_ = sorted(((space.age(pod.uid), space) for space in alone), key=_age)
    if oldest == next_oldest:
        raise ForeignNetnsError(
            f"pod {pod.uid}: {first} and {second} are equally old; cannot decide which is the pod's"
        )
    return first


def _age(aged: tuple[int, Candidate]) -> int:
    return aged[0]


def _nothing(node: Candidates, pod: Pod, mine: Sequence[Candidate]) -> SluiceError:
    if mine:
        wrong = "has processes of others too, and no address of the pod is known yet"
        if pod.addresses:
            wrong = f"holds none of its addresses ({', '.join(sorted(_plain(pod.addresses)))})"
        problems = [f"{space}: {space.problem}" for space in mine if space.problem]
        cause = "; ".join(problems) or f"{' and '.join(map(str, mine))} {wrong}"
        return ForeignNetnsError(f"pod {pod.uid}: {cause}; not touching it")
    if (pid := node.astray().get(pod.uid)) is not None:
        cause = f"its process {pid} is in the host's network namespace"
        return HostNetnsError(f"pod {pod.uid}: {cause}, and no other one was found")
    if (pid := node.hidden.get(pod.uid)) is not None:
        cause = f"Permission denied; the agent needs CAP_SYS_PTRACE, and pod {pod.uid} has that process"
        return KernelError(f"look up the network namespace of process {pid}", errno.EPERM, cause)
    return NetnsError(
        f"pod {pod.uid}: no network namespace found (no process or mount on this node could be matched to it)"
    )


def _plain(addresses: Collection[str]) -> frozenset[str]:
    """Normalises addresses as ipaddress writes them; invalid ones are left out."""
    parsed = set()
    for word in addresses:
        with contextlib.suppress(ValueError):
            parsed.add(str(ipaddress.ip_address(word)))
    return frozenset(parsed)


def _only(candidates: Sequence[Candidate]) -> Candidate | None:
    return candidates[0] if len(candidates) == 1 else None

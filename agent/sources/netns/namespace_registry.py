# SPDX-License-Identifier: Apache-2.0
"""Each pod's namespace: found, proven to be that pod's, kept open and pinned.

Found by the descriptor that the CNI plugin handed over, by our own pin, or by the path that a source gave.
Proven by not being the host's (guard in kernel.netns), by the cookie noted earlier, and by holding one of
the pod's addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from agent.core.errors import ForeignNetnsError, NetnsError, PodGoneError
from agent.core.model.pods import Pod
from agent.kernel.netns import Netns, NetnsId, unpin
from agent.kernel.pod_netns import PodNetns
from agent.sources.state.notes import Note, Notes

if TYPE_CHECKING:  # the first repair of a start searches for nothing, and all that it imports delays it
    from agent.sources.netns.batcher import SearchBatcher


class NamespaceRegistry:
    """Keeps open namespaces by UID. For worker threads, one pod at a time each."""

    def __init__(self, state: Notes) -> None:
        """Finds no pod that comes without a namespace until `unannounced` is set."""
        self.unannounced: SearchBatcher | None = None
        self._state = state
        self._open: dict[str, PodNetns] = {}
        self._notes: dict[str, Note] = {}
        self._pinned: set[str] = set()
        self._paths: dict[str, Path] = {}  # where unannounced pods were found last
        self._lock = threading.Lock()

    def restore(self, note: Note) -> None:
        """Takes a note of the previous agent."""
        self._notes[note.pod.uid] = note

    def adopt(self, uid: str, netns: Netns) -> None:
        """Takes over a source's handle; an equal one that is open already stays."""
        with self._lock:
            known = self._open.get(uid)
            if known is not None and known.netns.id == netns.id:
                netns.close()
                return
            self._refuse_foreign(uid, netns)
            self._open[uid] = PodNetns(netns)
        if known is not None:
            known.close()

    def _refuse_foreign(self, uid: str, netns: Netns) -> None:
        """Closes it and raises ForeignNetnsError if another pod has it, also a pod that only a note knows yet."""
        opened = ((pod, target.netns.id) for pod, target in list(self._open.items()))
        noted = ((pod, note.netns) for pod, note in list(self._notes.items()) if note.captured and note.netns)
        for pod, held in (*opened, *noted):
            if pod != uid and held.same(netns.id):
                netns.close()
                raise ForeignNetnsError(f"{netns.origin} is the network namespace of pod {pod}; not touching it")

    def id(self, uid: str) -> NetnsId | None:
        """Returns the last known namespace of the pod."""
        known = self._open.get(uid)
        if known is not None:
            return known.netns.id
        note = self._notes.get(uid)
        return note.netns if note else None

    def opened(self, uid: str) -> PodNetns | None:
        """Returns the pod's open handle, or None."""
        return self._open.get(uid)

    def occupied(self, target: PodNetns) -> bool:
        """Returns True if a process is in the namespace. Blocking. Raises KernelError."""
        from agent.sources.netns import search

        return search.lives(target.netns.id, ())

    def dead(self, cookies: Collection[int]) -> frozenset[int]:
        """Returns the cookies that belong to no known pod, and to no namespace found on this node.

        The latter may belong to a pod with a damaged note. Empty if some namespace is unreadable. Blocking.
        """
        from agent.sources.netns import existing

        strange = frozenset(cookies) - self._cookies()
        if not strange:
            return strange
        problems: list[str] = []
        for netns in existing.namespaces(existing.netns_paths(str(self._state.pods.parent), ()), problems):
            strange -= {netns.id.cookie}
            netns.close()
        return frozenset() if problems else strange - self._cookies()

    def _cookies(self) -> frozenset[int]:
        opened = {target.netns.id.cookie for target in list(self._open.values())}
        return frozenset(opened | {note.netns.cookie for note in list(self._notes.values()) if note.netns})

    def resolve(self, pod: Pod) -> PodNetns:
        target = self._open.get(pod.uid)
        if target is None:
            netns = self._find(pod)
            with self._lock:
                self._refuse_foreign(pod.uid, netns)
                target = self._open[pod.uid] = PodNetns(netns)
        if self._left(pod, target):
            where = pod.netns_path or "any place on this node"
            raise PodGoneError(f"pod {pod.key}: its namespace is empty and no longer at {where}")
        if not _holds(target, pod):
            raise ForeignNetnsError(
                f"pod {pod.key}: {target.netns.origin} holds none of its addresses "
                f"({', '.join(pod.addresses)}); not touching it"
            )
        return target

    def is_new(self, pod: Pod) -> bool:
        return pod.source == "cni" and pod.uid not in self._notes

    def remember(
        self, pod: Pod, *, captured: bool, preexisting: tuple[int, ...] = (), preswitch: tuple[int, ...] = ()
    ) -> None:
        target = self._open.get(pod.uid)
        note = Note(
            pod,
            captured=captured,
            netns=target.netns.id if target else None,
            preexisting=preexisting,
            preswitch=preswitch,
        )
        if captured and target is not None and pod.uid not in self._pinned:
            target.netns.pin(self._state.pin(pod.uid))
            self._pinned.add(pod.uid)
        if self._notes.get(pod.uid) != note:
            self._state.save(note)
            self._notes[pod.uid] = note
        if not captured and pod.netns_path:
            self._let_go(pod.uid)
        elif not captured:  # the handle stays: searching for it again takes long
            self._unpin(pod.uid)

    def was_captured(self, uid: str) -> bool:
        note = self._notes.get(uid)
        return note is not None and note.captured

    def release(self, uid: str) -> None:
        self._let_go(uid)
        self._paths.pop(uid, None)
        self._notes.pop(uid, None)
        self._state.remove(uid)

    def close(self) -> None:
        """Closes handles at the end of the process; pins and notes stay for the next one."""
        for target in self._open.values():
            target.close()
        self._open.clear()

    def _let_go(self, uid: str) -> None:
        with self._lock:
            target = self._open.pop(uid, None)
        if target is not None:
            target.close()
        self._unpin(uid)

    def _unpin(self, uid: str) -> None:
        self._pinned.discard(uid)
        unpin(self._state.pin(uid))

    def _find(self, pod: Pod) -> Netns:
        note = self._notes.get(pod.uid)
        pin = self._state.pin(pod.uid)
        wanted = note.netns if note else None
        problems = []
        announced = Path(pod.netns_path) if pod.netns_path else self._paths.get(pod.uid)
        for path in (pin, announced):
            if path is None or (path == pin and not pin.exists()):
                continue
            try:
                netns = Netns.open(path)
            except NetnsError as error:
                if path != pin:
                    problems.append(error)
                continue
            if wanted is None or netns.id.same(wanted):
                if path == pin:
                    self._pinned.add(pod.uid)
                return netns
            netns.close()
            problems.append(NetnsError(f"{path}: is another network namespace by now"))
        if not pod.netns_path and self.unannounced is not None:
            try:
                netns = self.unannounced.find(pod, self._open.keys())
            except NetnsError as error:
                if type(error) is not NetnsError:  # a namespace was found, but not proven to be the pod's
                    raise
                problems.append(error)
            else:
                if wanted is None or netns.id.same(wanted):
                    self._paths[pod.uid] = Path(netns.origin)
                    return netns
                netns.close()
                problems.append(NetnsError(f"{netns.origin}: is another network namespace by now"))
        if pod.orphan or (note is not None and note.netns is not None):
            raise PodGoneError(f"pod {pod.key}: its namespace is gone ({problems[0] if problems else 'no pin'})")
        if problems:
            raise type(problems[-1])(f"pod {pod.key}: {problems[-1]}")
        raise NetnsError(f"pod {pod.key}: no path of its network namespace is known")

    def _left(self, pod: Pod, target: PodNetns) -> bool:
        """Returns True if only the agent's own handles hold this namespace."""
        if target.addresses():
            return False
        if not pod.netns_path:
            from agent.sources.netns import search

            return not search.lives(target.netns.id)
        try:
            with Netns.open(pod.netns_path) as there:
                return not there.id.same(target.netns.id)
        except NetnsError:
            return True


def _holds(target: PodNetns, pod: Pod) -> bool:
    """Returns True if the namespace has an address of the pod, or none is known. Both as ipaddress writes them."""
    return not pod.addresses or not set(pod.addresses).isdisjoint(target.addresses())

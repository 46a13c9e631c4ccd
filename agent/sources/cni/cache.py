# SPDX-License-Identifier: Apache-2.0
"""Finds running pods that are unknown to the agent in the runtime's cache.

A CNI configuration without the plugin started them, or the agent's notes are lost.

libcni caches its calls per sandbox for DEL (libcni/api.go, `cachedInfo`): the configuration list of that time and the
arguments from the runtime. Only running pods count: after a power failure entries of others are left.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.core.model.pods import Pod
from agent.core.names import CNI_TYPE
from agent.kernel import proc as processes
from agent.sources.cni.wire import ANNOTATIONS
from agent.sources.netns import cgroups

RESULTS = "/var/lib/cni/results"  # libcni's CacheDir
_MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class CachedSandbox:
    """One sandbox. `chained`: Sluice's plugin was called for it."""

    sandbox: str
    pod: Pod
    chained: bool


def parse(data: bytes) -> CachedSandbox | None:
    """Parses an entry; None if it is not for a pod's sandbox. Entries are foreign input. Pure."""
    try:
        note = json.loads(data)
        config = base64.b64decode(note["config"])
        args = {str(key): str(value) for key, value in note["cniArgs"]}
        given = (note.get("capabilityArgs") or {}).get(ANNOTATIONS) or {}
        annotations = {str(key): str(value) for key, value in given.items()}
        namespace, name = args["K8S_POD_NAMESPACE"], args["K8S_POD_NAME"]
        pod = Pod(args.get("K8S_POD_UID", ""), namespace, name, annotations=annotations)
        return CachedSandbox(str(note["containerId"]), pod, f'"{CNI_TYPE}"'.encode() in config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def find(directory: Path, wanted: Callable[[Pod], bool], proc: str = "/proc") -> Iterator[CachedSandbox]:
    """Yields the running sandboxes among the `wanted`. Blocking. Raises KernelError, OSError."""
    notes = [note for note in _notes(directory) if wanted(note.pod)]
    if notes:  # otherwise /proc need not be read
        running = _running(proc)
        yield from (note for note in notes if note.sandbox in running or note.pod.uid in running)


def _notes(directory: Path) -> Iterator[CachedSandbox]:
    try:
        paths = sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in paths:
        try:
            with path.open("rb") as file:
                note = parse(file.read(_MOST))
        except OSError:
            continue  # a pod that is ending
        if note is not None:
            yield note


def _running(proc: str) -> frozenset[str]:
    """Returns the UIDs of pods and ids of containers that have a process."""
    outside = cgroups.enclosing(processes.cgroup(1, proc))
    seen, hidden = processes.processes(proc)
    texts = {one.cgroup for one in seen} | {text for _, text in hidden}
    owners = [cgroups.owner(text, outside) for text in texts]
    return frozenset(name for one in owners for name in (one.uid, one.container) if name)

"""Running pods that nobody told the agent of, as the runtime itself remembers them: made by a CNI configuration without
our plugin, or known to an agent whose notes are lost.

libcni keeps what it called for each sandbox, DEL needs it (libcni/api.go, `cachedInfo`): the list as it was then, and
what the runtime told the plugins. Only pods that run are of interest: after a power failure notes of others are left.
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
from agent.sources.netns import cgroups

RESULTS = "/var/lib/cni/results"  # libcni's CacheDir
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"  # containerd's and CRI-O's capability
_MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class CachedSandbox:
    """One sandbox. `chained`: our plugin was called for it."""

    sandbox: str
    pod: Pod
    chained: bool


def parse(data: bytes) -> CachedSandbox | None:
    """None for what is no note of a pod's sandbox; notes are foreign input. Pure."""
    try:
        note = json.loads(data)
        config = base64.b64decode(note["config"])
        told = {str(key): str(value) for key, value in note["cniArgs"]}
        given = (note.get("capabilityArgs") or {}).get(ANNOTATIONS) or {}
        annotations = {str(key): str(value) for key, value in given.items()}
        namespace, name = told["K8S_POD_NAMESPACE"], told["K8S_POD_NAME"]
        pod = Pod(told.get("K8S_POD_UID", ""), namespace, name, annotations=annotations)
        return CachedSandbox(str(note["containerId"]), pod, f'"{CNI_TYPE}"'.encode() in config)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def find(directory: Path, wanted: Callable[[Pod], bool], proc: str = "/proc") -> Iterator[CachedSandbox]:
    """Those of the `wanted` that run. Blocking. Raises KernelError, OSError."""
    notes = [note for note in _notes(directory) if wanted(note.pod)]
    if notes:  # else nobody has to read all of /proc
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
            continue  # a pod that goes
        if note is not None:
            yield note


def _running(proc: str) -> frozenset[str]:
    """UIDs of pods and ids of containers that have a process."""
    outside = cgroups.enclosing(processes.cgroup(1, proc))
    seen, hidden = processes.processes(proc)
    texts = {one.cgroup for one in seen} | {text for _, text in hidden}
    owners = [cgroups.owner(text, outside) for text in texts]
    return frozenset(name for one in owners for name in (one.uid, one.container) if name)

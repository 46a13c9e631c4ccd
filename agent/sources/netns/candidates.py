# SPDX-License-Identifier: Apache-2.0
"""Lists the network namespaces of this node from /proc and mounts, with the owners of the processes in each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from agent.core.errors import NetnsError, SluiceError
from agent.kernel import proc as processes
from agent.kernel.netlink.route_socket import RouteSocket
from agent.kernel.netns import Netns
from agent.kernel.proc import NsKey, ProcessSeen
from agent.sources.netns import cgroups

_CONTAINER = "container "


@dataclass(slots=True)
class Candidate:
    """One namespace. `owners`: UID, or "container ID" for an unknown container -> its processes in here."""

    key: NsKey
    proc: str
    _: KW_ONLY
    owners: dict[str, list[ProcessSeen]] = field(default_factory=dict)
    mount: str = ""
    _netns: Netns | None = None
    _addresses: frozenset[str] = frozenset()
    problem: SluiceError | None = None

    def __str__(self) -> str:
        first = next(iter(self.owners.values()), None)
        return self.mount or f"the network namespace of process {first[0].pid if first else '?'}"

    def age(self, owner: str) -> int:
        """Returns the start of the owner's oldest process in here, in ticks since boot; maxsize without processes."""
        ages = [processes.started(one.pid, self.proc) for one in self.owners[owner]]
        return min((age for age in ages if age is not None), default=sys.maxsize)

    def addresses(self) -> frozenset[str]:
        """Returns its addresses except loopback and link-local; none if it cannot be read, see `problem`."""
        with contextlib.suppress(SluiceError):
            self._open()
        return self._addresses

    def take(self) -> Netns:
        """Returns the open handle, for the caller to close. Raises SluiceError."""
        netns = self._open()
        self._netns = None
        return netns

    def close(self) -> None:
        if self._netns is not None:
            self._netns.close()

    def _open(self) -> Netns:
        """Opens it once. Raises SluiceError, the same one on every call."""
        if self.problem is not None:
            raise self.problem
        if self._netns is None:
            try:
                self._netns = self._open_first()
                self._addresses = frozenset(self._netns.call(_held))
            except SluiceError as problem:
                self.problem = problem
                raise
            except OSError as error:
                self.problem = NetnsError(f"look into {self}: {error.strerror}")
                raise self.problem from error
        return self._netns

    def _open_first(self) -> Netns:
        """Tries a mount first: it lasts as long as the pod, even if processes end."""
        for path, seen in self._paths():
            try:
                netns = Netns.open(path)
            except NetnsError:
                continue  # its process ended meanwhile
            # A namespace's number is used again, so what was seen must hold after it was opened, too.
            same = (netns.id.device, netns.id.inode) == self.key
            if same and (seen is None or processes.read_process(seen.pid, self.proc) == seen):
                return netns
            netns.close()
        raise NetnsError(f"{self} went away while it was looked at")

    def _paths(self) -> Iterator[tuple[str, ProcessSeen | None]]:
        if self.mount:
            yield self.mount, None
        for seen in (one for each in self.owners.values() for one in each):
            yield f"{self.proc}/{seen.pid}/ns/net", seen


class Candidates:
    """All namespaces except the host's. `hidden`: UID -> a process of it with an unreadable namespace."""

    def __init__(self, containers: Mapping[str, str], folders: Sequence[str], proc: str) -> None:
        """Reads /proc once. `containers`: id -> UID of known containers. Raises KernelError."""
        self._containers = containers
        self._proc = proc
        self._outside = cgroups.enclosing(processes.cgroup(1, proc))
        self._owners: dict[str, str] = {}
        self._all: dict[NsKey, Candidate] = {}
        self._of: dict[str, list[Candidate]] = {}
        self._astray: dict[str, int] | None = None
        hosts = processes.hosts_netns(proc)
        seen, hidden = processes.processes(proc)
        self.hidden = {self._owner(cgroup): pid for pid, cgroup in hidden}
        for one in seen:
            self._add(one)
        for key, path in _mounts(folders):
            if key not in hosts:
                space = self._space(key)
                space.mount = space.mount or path

    def of(self, uid: str) -> Sequence[Candidate]:
        """Returns the namespaces with a process of the pod."""
        return self._of.get(uid, ())

    def has(self, key: NsKey) -> bool:
        """Returns True if a process or a mount holds that namespace, or containers' namespaces are unreadable."""
        return key in self._all or any(self.hidden)

    def mounted(self) -> Sequence[Candidate]:
        """Returns the mounted namespaces without a container's process."""
        return [space for space in self._all.values() if space.mount and not space.owners]

    def strange(self) -> Sequence[Candidate]:
        """Returns the mounted namespaces with processes of unknown containers only."""
        return [
            space
            for space in self._all.values()
            if space.mount and space.owners and all(owner.startswith(_CONTAINER) for owner in space.owners)
        ]

    def astray(self) -> Mapping[str, int]:
        """Returns UID -> a process of it in the host's namespace; read on the first call."""
        if self._astray is None:
            self._astray = {self._owner(cgroup): pid for pid, cgroup in processes.in_hosts(self._proc)}
        return self._astray

    def close(self) -> None:
        for space in self._all.values():
            space.close()

    def _add(self, one: ProcessSeen) -> None:
        space = self._space(one.netns)
        owner = self._owner(one.cgroup)
        if owner:
            if owner not in space.owners:
                self._of.setdefault(owner, []).append(space)
            space.owners.setdefault(owner, []).append(one)

    def _space(self, key: NsKey) -> Candidate:
        return self._all.setdefault(key, Candidate(key, self._proc))

    def _owner(self, cgroup: str) -> str:
        """Returns the owner, as in `Candidate.owners`, by the text of a process's cgroup file, or ""."""
        if cgroup not in self._owners:
            owner = cgroups.owner(cgroup, self._outside)
            unknown = _CONTAINER + owner.container if owner.container else ""
            self._owners[cgroup] = owner.uid or self._containers.get(owner.container, unknown)
        return self._owners[cgroup]


def _mounts(folders: Sequence[str]) -> Iterable[tuple[NsKey, str]]:
    for folder in folders:
        with contextlib.suppress(OSError):
            for path in sorted(Path(folder).iterdir()):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    yield (status.st_dev, status.st_ino), str(path)


def _held() -> list[str]:
    with contextlib.closing(RouteSocket()) as route:
        held = [one.address for one in route.held_addresses()]
    return [str(one) for one in held if not one.is_loopback and not one.is_link_local]

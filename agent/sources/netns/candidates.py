"""Network namespaces of this node as /proc and mounts show them, and whose processes are in each."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.core.errors import NetnsError, SluiceError
from agent.kernel import proc as processes
from agent.kernel.netlink.routes import RouteSocket
from agent.kernel.netns import Netns
from agent.kernel.proc import NsKey, ProcessSeen
from agent.sources.netns import cgroups

_CONTAINER = "container "


@dataclass(slots=True)
class Candidate:
    """One namespace. `owners`: UID, or "container ID" for one that nobody knows -> its processes in here."""

    key: NsKey
    proc: str
    owners: dict[str, list[ProcessSeen]] = field(default_factory=dict)
    mount: str = ""
    _netns: Netns | None = None
    _addresses: frozenset[str] = frozenset()
    problem: SluiceError | None = None

    def __str__(self) -> str:
        first = next(iter(self.owners.values()), None)
        return self.mount or f"the network namespace of process {first[0].pid if first else '?'}"

    def age(self, owner: str) -> int:
        """When the oldest of its processes in here started, in ticks since boot; later than all when none is left."""
        ages = [processes.started(one.pid, self.proc) for one in self.owners[owner]]
        return min((age for age in ages if age is not None), default=sys.maxsize)

    def addresses(self) -> frozenset[str]:
        """All that it holds but loopback and link-local ones; none when it cannot be looked at, see `problem`."""
        with contextlib.suppress(SluiceError):
            self._open()
        return self._addresses

    def take(self) -> Netns:
        """The open handle, which is the caller's from now on. Raises SluiceError."""
        netns = self._open()
        self._netns = None
        return netns

    def close(self) -> None:
        if self._netns is not None:
            self._netns.close()

    def _open(self) -> Netns:
        """Opened once. Raises SluiceError, the same again when asked again."""
        if self.problem is not None:
            raise self.problem
        if self._netns is None:
            try:
                self._netns = self._found()
                self._addresses = frozenset(self._netns.call(_held))
            except SluiceError as problem:
                self.problem = problem
                raise
            except OSError as error:
                self.problem = NetnsError(f"look into {self}: {error.strerror}")
                raise self.problem from error
        return self._netns

    def _found(self) -> Netns:
        """A mount first: it is there for as long as the pod is, whichever of its processes end."""
        for path, seen in self._places():
            try:
                netns = Netns.open(path)
            except NetnsError:
                continue  # it ended meanwhile
            # A namespace's number is used again, so what was seen must hold after it was opened, too.
            same = (netns.id.device, netns.id.inode) == self.key
            if same and (seen is None or processes.read_process(seen.pid, self.proc) == seen):
                return netns
            netns.close()
        raise NetnsError(f"{self} went away while it was looked at")

    def _places(self) -> Iterator[tuple[str, ProcessSeen | None]]:
        if self.mount:
            yield self.mount, None
        for seen in (one for each in self.owners.values() for one in each):
            yield f"{self.proc}/{seen.pid}/ns/net", seen


class Candidates:
    """All namespaces but the host's, as of now. `hidden`: UID -> a process of it whose namespace we may not see."""

    def __init__(self, containers: Mapping[str, str], folders: Sequence[str], proc: str) -> None:
        """Reads /proc once. `containers`: id -> UID of those that are known. Raises KernelError."""
        self._containers = containers
        self._proc = proc
        self._outside = cgroups.enclosing(processes.cgroup(1, proc))
        self._whose_text: dict[str, str] = {}
        self._all: dict[NsKey, Candidate] = {}
        self._of: dict[str, list[Candidate]] = {}
        self._astray: dict[str, int] | None = None
        hosts = processes.hosts_netns(proc)
        seen, hidden = processes.processes(proc)
        self.hidden = {self._whose(cgroup): pid for pid, cgroup in hidden}
        for one in seen:
            self._add(one)
        for key, path in _mounts(folders):
            if key not in hosts:
                space = self._space(key)
                space.mount = space.mount or path

    def of(self, uid: str) -> Sequence[Candidate]:
        """Those that a process of the pod is in."""
        return self._of.get(uid, ())

    def has(self, key: NsKey) -> bool:
        """Whether a process is in that namespace or a mount leads to it; True when containers' are hidden from us."""
        return key in self._all or any(self.hidden)

    def mounted(self) -> Sequence[Candidate]:
        """Those that are mounted, and in which no container's process is."""
        return [space for space in self._all.values() if space.mount and not space.owners]

    def strange(self) -> Sequence[Candidate]:
        """Those that are mounted, and in which there are processes of containers alone that nobody knows."""
        return [
            space
            for space in self._all.values()
            if space.mount and space.owners and all(owner.startswith(_CONTAINER) for owner in space.owners)
        ]

    def astray(self) -> Mapping[str, int]:
        """UID -> a process of it in the host's namespace; read when first asked for."""
        if self._astray is None:
            self._astray = {self._whose(cgroup): pid for pid, cgroup in processes.in_hosts(self._proc)}
        return self._astray

    def close(self) -> None:
        for space in self._all.values():
            space.close()

    def _add(self, one: ProcessSeen) -> None:
        space = self._space(one.netns)
        owner = self._whose(one.cgroup)
        if owner:
            if owner not in space.owners:
                self._of.setdefault(owner, []).append(space)
            space.owners.setdefault(owner, []).append(one)

    def _space(self, key: NsKey) -> Candidate:
        return self._all.setdefault(key, Candidate(key, self._proc))

    def _whose(self, cgroup: str) -> str:
        """By the text of a process's cgroup file: an owner as `Candidate` has them, or ""."""
        if cgroup not in self._whose_text:
            owner = cgroups.owner(cgroup, self._outside)
            nobodys = _CONTAINER + owner.container if owner.container else ""
            self._whose_text[cgroup] = owner.uid or self._containers.get(owner.container, nobodys)
        return self._whose_text[cgroup]


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

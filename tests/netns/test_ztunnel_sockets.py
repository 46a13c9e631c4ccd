# SPDX-License-Identifier: Apache-2.0
"""ztunnel's listeners in a pod are told from the pod's own, and fetched from ztunnel itself; its cgroup."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.holders import Holder, cookie, shared
from support.ztunnel import Place

from agent.backends.ebpf.pins import Pins
from agent.backends.ebpf.programs import ProgramsBackend
from agent.backends.ebpf.ztunnels import Listener, Role, Ztunnels
from agent.core.errors import KernelError, StaleError
from agent.core.model.redirect import Redirect
from agent.core.names import ZTUNNEL_MARK
from agent.kernel import process
from agent.kernel.exec import run
from agent.kernel.netns import Netns
from agent.kernel.pod_netns import PodNetns
from agent.kernel.process import Process

pytestmark = pytest.mark.root
OUTBOUND, INBOUND = Role.OUTBOUND.port, Role.INBOUND.port
CGROUP2 = Path("/sys/fs/cgroup/unified")


class Stage:
    """A registry, pods, and processes that go away with the test."""

    def __init__(self, folder: Path, made: contextlib.ExitStack) -> None:
        self.folder, self._made = folder, made
        self.registry = Ztunnels()
        self._pods = 0
        made.callback(self._forget)

    def pod(self) -> tuple[Place, PodNetns]:
        self._pods += 1
        place = Place(f"slu-zs-{os.getpid()}-{self._pods}")
        self._made.callback(place.remove)
        target = PodNetns(Netns.open(place.path))
        self._made.callback(target.close)
        return place, target

    def holder(self) -> Holder:
        made = Holder(self.folder)
        self._made.callback(made.end)
        return made

    def ztunnel(self) -> Holder:
        made = self.holder()
        self.registry.arrived(made.process())
        return made

    def cgroup(self, *members: Holder) -> int:
        """The id of a new cgroup of these processes."""
        root = CGROUP2 if CGROUP2.is_dir() else CGROUP2.parent
        place = root / f"slu-zs-{os.getpid()}-{members[0].pid}"
        place.mkdir()
        self._made.callback(self._dissolve, place, root)
        for one in members:
            (place / "cgroup.procs").write_text(str(one.pid))
        return place.stat().st_ino

    @staticmethod
    def _dissolve(place: Path, root: Path) -> None:
        for pid in (place / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(pid)
        place.rmdir()

    def _forget(self) -> None:
        for one in self.registry.processes():
            one.close()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with contextlib.ExitStack() as made:
        yield Stage(tmp_path, made)


def listen(place: Place, holder: Holder, port: int, host: str = "::", mark: int = ZTUNNEL_MARK) -> int:
    """The cookie of a listener that only `holder` has."""
    made = shared(place, host, port, mark=mark)
    found = cookie(made)
    holder.keep(made)
    return found


def names(stage: Stage, target: PodNetns, role: Role) -> list[int]:
    return [one.cookie for one in stage.registry.listeners(target)[role]]


def fetched(listener: Listener) -> int:
    """The cookie of the socket that the listener opens."""
    with socket.socket(fileno=listener.open()) as made:
        return cookie(made)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_what_ztunnel_listens_on_is_fetched_and_works(stage: Stage) -> None:
    place, target = stage.pod()
    ztunnel = stage.ztunnel()
    outbound, inbound = listen(place, ztunnel, OUTBOUND), listen(place, ztunnel, INBOUND)
    listen(place, ztunnel, 15008)
    before = descriptors()
    found = stage.registry.listeners(target)
    assert {role: [one.cookie for one in each] for role, each in found.items()} == {
        Role.OUTBOUND: [outbound], Role.INBOUND: [inbound]
    }  # fmt: skip
    assert descriptors() == before
    (listener,) = found[Role.OUTBOUND]
    taken = listener.open()
    assert not os.get_inheritable(taken)
    with socket.socket(fileno=taken) as made, place.connect("127.0.0.1", OUTBOUND) as client:
        made.settimeout(20)
        far, peer = made.accept()
        assert cookie(made) == outbound and peer[1] == client.getsockname()[1]
        far.close()
    assert descriptors() == before


@pytest.mark.parametrize("mark", [0, ZTUNNEL_MARK])
def test_a_pods_own_listeners_are_never_taken_for_ztunnels(stage: Stage, mark: int) -> None:
    place, target = stage.pod()
    hostile, ztunnel = stage.holder(), stage.ztunnel()
    for port in (OUTBOUND, INBOUND):
        listen(place, hostile, port, mark=mark)
    assert stage.registry.listeners(target) == {Role.OUTBOUND: [], Role.INBOUND: []}
    mine = listen(place, ztunnel, INBOUND)
    listen(place, hostile, INBOUND, "0.0.0.0", mark=mark)
    (only,) = stage.registry.listeners(target)[Role.INBOUND]
    assert (only.cookie, fetched(only)) == (mine, mine)
    assert names(stage, target, Role.OUTBOUND) == []


def test_sockets_that_do_not_listen_or_are_elsewhere_do_not_count(stage: Stage) -> None:
    place, target = stage.pod()
    other, other_target = stage.pod()
    ztunnel = stage.ztunnel()
    ztunnel.keep(shared(place, "::", OUTBOUND, listening=False))
    there = listen(other, ztunnel, OUTBOUND)
    assert names(stage, target, Role.OUTBOUND) == []
    assert names(stage, other_target, Role.OUTBOUND) == [there]


def test_the_newest_ztunnel_comes_first_and_the_older_one_remains(stage: Stage) -> None:
    place, target = stage.pod()
    alone, alone_target = stage.pod()
    older = stage.ztunnel()
    first, left = listen(place, older, INBOUND), listen(alone, older, INBOUND)
    assert names(stage, target, Role.INBOUND) == [first]
    newer = stage.ztunnel()
    second = listen(place, newer, INBOUND)
    assert [one.pid for one in stage.registry.processes()] == [newer.pid, older.pid]
    assert names(stage, target, Role.INBOUND) == [second, first]
    assert names(stage, alone_target, Role.INBOUND) == [left]  # the newer one has not been given this pod yet
    newer.die()
    assert names(stage, target, Role.INBOUND) == [first]
    assert [one.pid for one in stage.registry.processes()] == [older.pid]


def test_no_more_than_two_of_a_role(stage: Stage) -> None:
    place, target = stage.pod()
    made = [listen(place, stage.ztunnel(), OUTBOUND) for _ in range(3)]
    assert names(stage, target, Role.OUTBOUND) == [made[2], made[1]]


def test_order_is_by_start_when_they_come_back_to_a_new_agent(stage: Stage) -> None:
    older, newer = stage.holder(), stage.holder()
    while started(newer) == started(older):  # until they are a clock tick apart
        newer = stage.holder()
    for one in (newer, older):
        stage.registry.arrived(one.process())
    assert [one.pid for one in stage.registry.processes()] == [newer.pid, older.pid]


def started(holder: Holder) -> int:
    with contextlib.closing(holder.process()) as held:
        return held.started


def test_a_ztunnel_that_comes_again_is_one_and_drains_without_its_connection(stage: Stage) -> None:
    place, target = stage.pod()
    ztunnel = stage.ztunnel()
    mine = listen(place, ztunnel, OUTBOUND)
    before = descriptors()
    stage.registry.arrived(ztunnel.process())
    assert (len(stage.registry.processes()), descriptors()) == (1, before)
    ztunnel.link.close()
    assert names(stage, target, Role.OUTBOUND) == [mine]


def test_the_dead_are_let_go_of(stage: Stage) -> None:
    place, target = stage.pod()
    before = descriptors()
    ztunnel = stage.ztunnel()
    listen(place, ztunnel, OUTBOUND)
    (listener,) = stage.registry.listeners(target)[Role.OUTBOUND]
    (process,) = stage.registry.processes()
    ztunnel.die()
    assert not process.alive()
    with pytest.raises(StaleError, match="no longer there"):
        listener.open()
    assert stage.registry.listeners(target)[Role.OUTBOUND] == []
    assert (stage.registry.processes(), stage.registry.keys()) == ((), set())
    ztunnel.end()
    assert descriptors() == before
    with pytest.raises(StaleError):
        listener.open()


@pytest.mark.parametrize("what", ["nothing", "file", "elsewhere", "pods"])
def test_a_number_that_means_something_else_meanwhile(stage: Stage, what: str) -> None:
    place, target = stage.pod()
    other, _ = stage.pod()
    ztunnel = stage.ztunnel()
    made = shared(place, "::", INBOUND)
    mine = cookie(made)
    number = ztunnel.keep(made)
    (listener,) = stage.registry.listeners(target)[Role.INBOUND]
    ztunnel.tell("move", number, 200)
    if what == "file":
        ztunnel.tell("move", 1, number)
    if what == "elsewhere":
        assert ztunnel.keep(shared(other, "::", INBOUND)) == number
    if what == "pods":
        assert ztunnel.keep(shared(place, "::", INBOUND)) == number
    before = descriptors()
    assert fetched(listener) == mine  # found again under its new number
    ztunnel.tell("close", 200)
    with pytest.raises(StaleError, match="no longer there") as raised:
        listener.open()
    assert raised.value.errno == errno.ESTALE
    assert descriptors() == before
    assert mine not in names(stage, target, Role.INBOUND)


def test_a_listener_that_ztunnel_gave_away_is_no_longer_its_own(stage: Stage) -> None:
    """Known by its inode from before: it is not to be had from ztunnel, and from nobody else."""
    place, target = stage.pod()
    hostile, ztunnel = stage.holder(), stage.ztunnel()
    made = shared(place, "::", INBOUND)
    with made.dup() as copy:
        number = ztunnel.keep(made)
        (listener,) = stage.registry.listeners(target)[Role.INBOUND]
        hostile.keep(copy)
    ztunnel.tell("close", number)
    with pytest.raises(StaleError):
        listener.open()
    assert names(stage, target, Role.INBOUND) == []


@pytest.mark.parametrize("by_path", [False, True])
def test_a_process_is_known_by_its_cgroup(stage: Stage, by_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_path:  # as before Linux 6.13
        monkeypatch.setattr(process, "_PIDFD_GET_INFO", 0)
    one, two = stage.ztunnel(), stage.ztunnel()
    if rooted(one):
        assert stage.registry.keys() == {(1, one.pid), (1, two.pid)}
    mine = stage.cgroup(one, two)
    assert stage.registry.keys() == {(mine, one.pid), (mine, two.pid)}
    monkeypatch.setattr(Process, "tgid_is_global", staticmethod(lambda: False))
    assert stage.registry.keys() == {(mine, 0)}
    two.die()
    monkeypatch.undo()
    assert stage.registry.keys() == {(mine, one.pid)}


def rooted(holder: Holder) -> bool:
    return "0::/" in Path(f"/proc/{holder.pid}/cgroup").read_text().splitlines()


def test_without_global_numbers_the_root_cgroup_would_be_everybody(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ztunnel = stage.ztunnel()
    if not rooted(ztunnel):
        root = CGROUP2 if CGROUP2.is_dir() else CGROUP2.parent
        (root / "cgroup.procs").write_text(str(ztunnel.pid))
    monkeypatch.setattr(Process, "tgid_is_global", staticmethod(lambda: False))
    with pytest.raises(KernelError, match="hostPID: true") as raised:
        stage.registry.keys()
    assert str(ztunnel.pid) in str(raised.value)


def test_where_another_backend_captures_that_is_no_matter(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account knows ztunnels whatever captures; a node with nftables was refused every pod for that."""
    ztunnel = stage.ztunnel()
    if not rooted(ztunnel):
        ((CGROUP2 if CGROUP2.is_dir() else CGROUP2.parent) / "cgroup.procs").write_text(str(ztunnel.pid))
    monkeypatch.setattr(Process, "tgid_is_global", staticmethod(lambda: False))
    programs, (_, target) = ProgramsBackend(Pins.of(str(tmp_path / "sluice")), stage.registry), stage.pod()
    have = programs.read(target)
    assert not programs.plan(None, have).steps
    with pytest.raises(KernelError, match="hostPID: true"):
        programs.plan(Redirect(), have)


def test_a_pid_namespace_of_our_own_is_seen() -> None:
    code = "from agent.kernel.process import Process; print(Process.tgid_is_global())"
    told = run(["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]).stdout
    assert (told.strip(), Process.tgid_is_global()) == ("False", True)


def test_readers_while_ztunnels_come_and_go(stage: Stage) -> None:
    """Nothing is raised but what says that it has gone, and no socket but the right one is ever had."""
    place, target = stage.pod()
    lasting = stage.ztunnel()
    mine = listen(place, lasting, OUTBOUND)
    stop, wrong = threading.Event(), list[object]()
    worker = threading.Thread(target=guarded(lambda: read(stage, target, mine), stop, wrong))
    before = descriptors()
    worker.start()
    try:
        for _ in range(12):
            passing = stage.ztunnel()
            listen(place, passing, OUTBOUND)
            stage.registry.listeners(target)
            passing.end()
            stage.registry.keys()
    finally:
        stop.set()
        worker.join()
    assert wrong == [] and names(stage, target, Role.OUTBOUND) == [mine]
    assert descriptors() == before


def read(stage: Stage, target: PodNetns, lasting: int) -> None:
    found = stage.registry.listeners(target)[Role.OUTBOUND]
    assert lasting in [one.cookie for one in found]
    for one in found:
        try:
            assert fetched(one) == one.cookie
        except StaleError:
            assert one.cookie != lasting


def guarded(action: Callable[[], None], stop: threading.Event, wrong: list[object]) -> Callable[[], None]:
    def loop() -> None:
        while not stop.is_set() and not wrong:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - told by the test, on its own thread
                wrong.append(error)

    return loop

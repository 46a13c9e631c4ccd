# SPDX-License-Identifier: Apache-2.0
"""Which namespace is a pod's when nobody announced it: real processes, cgroups, mounts and addresses, and decoys."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.core.errors import ForeignNetnsError, HostNetnsError, NetnsError, SluiceError
from agent.core.model.pods import Pod
from agent.kernel.bpf.bpffs import cgroup_root
from agent.kernel.netns import Netns, unpin
from agent.kernel.proc import started
from agent.lab.links import add_namespace, links, remove_namespace
from agent.sources.netns import search as searching
from agent.sources.netns.search import NETNS_DIRS, search

pytestmark = pytest.mark.root
ADDRESS, OTHER = "198.18.200.7", "198.18.200.8"


def inode(path: str | Path) -> int:
    return Path(path).stat().st_ino


def descriptors() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


class Node:
    """Namespaces `slu-se-PID-N` with one link each, processes in them, and cgroups below one of our own."""

    def __init__(self, folder: Path, undo: ExitStack) -> None:
        self.mounts, self._undo, self._count = folder, undo, 0
        self._root = cgroup_root() / f"slu-se-{os.getpid()}"

    def netns(self, *addresses: str) -> Path:
        self._count += 1
        name = f"slu-se-{os.getpid()}-{self._count}"
        add_namespace(name)
        self._undo.callback(remove_namespace, name)
        self.inside(Path("/run/netns", name), *addresses)
        return Path("/run/netns", name)

    def inside(self, path: Path, *addresses: str) -> None:
        with links(path) as within:
            within.veth("eth0", "eth1")
            within.add_addresses("eth0", *addresses)

    def mount(self, path: Path, name: str) -> Path:
        place = self.mounts / name
        with Netns.open(path) as netns:
            netns.pin(place)
        self._undo.callback(unpin, place)
        return place

    def cgroup(self, path: str) -> Path:
        place = self._root / path
        place.mkdir(parents=True, exist_ok=True)
        self._undo.callback(self._remove, place)
        return place

    def _remove(self, place: Path) -> None:
        while place != self._root.parent:
            try:
                place.rmdir()
            except FileNotFoundError:
                pass
            except OSError:  # another one is in it, and removes it
                return
            place = place.parent

    def process(self, cgroup: Path, netns: str | Path | None, *argv: str) -> int:
        """Starts it in the cgroup; with the process number once `argv`, which must print a line, has begun."""
        line = f'echo $$ > {cgroup}/cgroup.procs && exec "$@"'
        nsenter = ["nsenter", f"--net={netns}"] if netns else []
        program = [*nsenter, "sh", "-c", line, "sh", *argv] if argv else [*nsenter, "sh", "-c", line, "sh", *_WAITING]
        started = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self._undo.callback(_end, started)
        assert started.stdout is not None and started.stdout.readline() == b"here\n"
        return started.pid

    def pod(self, uid: str, netns: Path | None) -> int:
        return self.process(self.cgroup(f"kubepods/besteffort/pod{uid}/{'a' * 64}"), netns)

    def find(self, uid: str, *addresses: str, containers: tuple[str, ...] = ()) -> Netns:
        found = find(wanted(uid, *addresses, containers=containers), str(self.mounts))
        self._undo.callback(found.close)
        return found


def wanted(uid: str, *addresses: str, containers: tuple[str, ...] = ()) -> Pod:
    return Pod(uid, "", "", addresses=addresses, containers=containers)


def find(pod: Pod, *places: str) -> Netns:
    found = search([pod], places or NETNS_DIRS)[pod.uid]
    if isinstance(found, SluiceError):
        raise found
    return found


_WAITING = ("sh", "-c", "echo here; read line")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with ExitStack() as undo:
        yield Node(tmp_path, undo)


@pytest.fixture
def uid() -> str:
    return str(uuid.uuid4())


@pytest.mark.parametrize("known", [True, False], ids=["address", "no-address"])
def test_p54_the_namespace_of_a_pods_process_is_found(node: Node, uid: str, known: bool) -> None:
    where = node.netns(ADDRESS)
    pid = node.pod(uid, where)
    found = node.find(uid, *[ADDRESS] * known)
    assert found.id.inode == inode(where) and found.origin == f"/proc/{pid}/ns/net"


def test_p54_a_mount_is_preferred_for_the_path_since_it_outlives_processes(node: Node, uid: str) -> None:
    where = node.netns(ADDRESS)
    node.pod(uid, where)
    place = node.mount(where, "cni-1")
    found = node.find(uid, ADDRESS)
    assert found.origin == str(place) and found.id.inode == inode(where)


CGROUPS = [
    "kubepods/burstable/pod{uid}/{id}",
    "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/cri-containerd-{id}.scope",
    "kubepods.slice/kubepods-pod{slice}.slice/crio-{id}.scope/container",
    "system.slice/containerd.service/kubepods-besteffort-pod{slice}.slice:cri-containerd:{id}",
    "kubepods/pod{uid}/{id}/made/by/the/pod",
    "crio-{id}.scope",
    "docker/{id}",
]


@pytest.mark.parametrize("form", CGROUPS)
def test_p54_every_form_of_cgroup_is_known(node: Node, uid: str, form: str) -> None:
    where = node.netns(ADDRESS)
    container = "c0" * 32
    group = node.cgroup(form.format(uid=uid, slice=uid.replace("-", "_"), id=container))
    node.process(group, where)
    assert node.find(uid, ADDRESS, containers=(container,)).id.inode == inode(where)
    assert node.find(uid, containers=(container,)).id.inode == inode(where)


def test_p53_a_namespace_that_a_process_of_the_pod_made_for_itself_is_not_taken(node: Node, uid: str) -> None:
    where = node.netns(ADDRESS)
    group = node.cgroup(f"kubepods/pod{uid}/{'b' * 64}")
    decoy = node.process(group, where, "unshare", "-n", *_WAITING)  # older than what is in the pod's
    node.process(group, where)
    assert inode(f"/proc/{decoy}/ns/net") != inode(where)
    assert node.find(uid, ADDRESS).id.inode == inode(where)


def test_p53_with_no_address_known_the_oldest_process_tells(node: Node, uid: str) -> None:
    where = node.netns(ADDRESS)
    group = node.cgroup(f"kubepods/pod{uid}/{'b' * 64}")
    first = started(node.process(group, where))
    while started(node.process(node.cgroup("later"), None)) == first:  # ages are told in ticks of 10 ms
        pass
    decoys = [node.process(group, where, "unshare", "-n", *_WAITING) for _ in range(3)]
    assert len({inode(f"/proc/{pid}/ns/net") for pid in decoys} | {inode(where)}) == 4
    assert node.find(uid).id.inode == inode(where)


def test_p53_with_no_address_known_the_runtimes_mount_tells_before_age(node: Node, uid: str) -> None:
    where = node.netns(ADDRESS)
    node.mount(where, "cni-1")
    group = node.cgroup(f"kubepods/pod{uid}/{'b' * 64}")
    node.process(group, where, "unshare", "-n", *_WAITING)
    node.process(group, where)
    assert node.find(uid).id.inode == inode(where)


def test_p53_a_decoy_with_the_pods_address_loses_to_the_mount_and_else_neither_is_taken(node: Node, uid: str) -> None:
    where, decoy = node.netns(ADDRESS), node.netns(ADDRESS)
    group = node.cgroup(f"kubepods/pod{uid}/{'b' * 64}")
    node.process(group, decoy)
    node.process(group, where)
    with pytest.raises(ForeignNetnsError, match="cannot decide"):
        node.find(uid, ADDRESS)
    node.mount(where, "cni-1")
    assert node.find(uid, ADDRESS).id.inode == inode(where)


def test_p53_a_pod_whose_namespaces_hold_none_of_its_addresses_has_none(node: Node, uid: str) -> None:
    node.pod(uid, node.netns(OTHER))
    with pytest.raises(ForeignNetnsError, match=f"holds none of its addresses .{ADDRESS}"):
        node.find(uid, ADDRESS)


def test_p53_what_stands_further_down_in_a_cgroups_path_is_not_believed(node: Node, uid: str) -> None:
    """A pod may make cgroups of any name below its own, and claim to be somebody else there."""
    forger, where = str(uuid.uuid4()), node.netns(ADDRESS)
    node.process(node.cgroup(f"kubepods/pod{forger}/{'b' * 64}/kubepods/besteffort/pod{uid}/{'a' * 64}"), where)
    for addresses in ((ADDRESS,), ()):
        with pytest.raises(NetnsError, match="no process"):
            node.find(uid, *addresses)
        assert node.find(forger, *addresses).id.inode == inode(where)


def test_p53_a_process_in_a_cgroup_namespace_cannot_hide_its_pod(node: Node, uid: str) -> None:
    where = node.netns(ADDRESS)
    group = node.cgroup(f"kubepods/pod{uid}/{'b' * 64}")
    pid = node.process(group, where, "unshare", "-C", *_WAITING)
    assert inode(f"/proc/{pid}/ns/cgroup") != inode("/proc/self/ns/cgroup")
    assert node.find(uid).id.inode == inode(where)


def test_p53_processes_in_the_hosts_namespace_are_passed_over(node: Node, uid: str) -> None:
    """conmon of CRI-O, and whatever of the pod entered the host's."""
    where = node.netns(ADDRESS)
    group = node.cgroup(f"kubepods/pod{uid}/{'b' * 64}")
    node.process(node.cgroup(f"kubepods/pod{uid}/crio-conmon-{'b' * 64}.scope"), None)
    for addresses in ((ADDRESS,), ()):
        with pytest.raises(HostNetnsError, match="host's network namespace"):
            node.find(uid, *addresses)
    node.process(group, where)
    for addresses in ((ADDRESS,), ()):
        assert node.find(uid, *addresses).id.inode == inode(where)


def test_p53_a_process_of_the_pod_in_another_pods_namespace_leads_nowhere(node: Node, uid: str) -> None:
    neighbour, theirs = str(uuid.uuid4()), node.netns(OTHER)
    node.mount(theirs, "cni-1")
    node.pod(uid, theirs)
    node.process(node.cgroup(f"kubepods/pod{neighbour}/{'d' * 64}"), theirs)
    for addresses, words in (((ADDRESS,), "none of its addresses"), ((), "processes of others")):
        with pytest.raises(ForeignNetnsError, match=words):
            node.find(uid, *addresses)
    mine = node.netns(ADDRESS)
    node.pod(uid, mine)
    assert node.find(uid, ADDRESS).id.inode == node.find(uid).id.inode == inode(mine)
    assert node.find(neighbour, OTHER).id.inode == inode(theirs)


def test_p54_with_the_pause_process_gone_any_other_one_tells(node: Node, uid: str) -> None:
    """CRI-O with drop_infra_ctr: there is no process but those of the containers, and they come and go."""
    where = node.netns(ADDRESS)
    place = node.mount(where, "cni-1")
    group = node.cgroup(f"kubepods/pod{uid}/{'b' * 64}")
    pid = node.process(group, where)
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert node.find(uid, ADDRESS).origin == str(place), "none at all: a mount that holds the address"
    with pytest.raises(NetnsError, match="no process"):
        node.find(uid)  # nothing proves that the mount is this pod's
    node.process(group, where)
    assert node.find(uid).id.inode == inode(where)


def test_p53_a_mount_with_the_address_is_not_taken_while_another_pod_lives_in_it(node: Node, uid: str) -> None:
    """The address that the API still tells for a pod that has gone may be another's by now."""
    where = node.netns(ADDRESS)
    node.mount(where, "cni-1")
    node.process(node.cgroup(f"kubepods/pod{uuid.uuid4()}/{'d' * 64}"), where)
    with pytest.raises(NetnsError, match="no process"):
        node.find(uid, ADDRESS)
    other = node.netns(OTHER)
    node.mount(other, "cni-2")
    node.process(node.cgroup(f"crio-{'e' * 64}.scope"), other)  # of a pod that we cannot name
    with pytest.raises(ForeignNetnsError, match="unknown containers"):
        node.find(uid, OTHER)


def test_two_mounts_with_the_address_are_not_guessed_between(node: Node, uid: str) -> None:
    for name in ("cni-1", "cni-2"):
        node.mount(node.netns(ADDRESS), name)
    with pytest.raises(ForeignNetnsError, match=r"cni-1 and .*cni-2 have an address"):
        node.find(uid, ADDRESS)


def test_ipv6_addresses_are_compared_as_addresses(node: Node, uid: str) -> None:
    where = node.netns("fd00:198:18::7")
    node.pod(uid, where)
    assert node.find(uid, "FD00:198:18:0::7", "203.0.113.1").id.inode == inode(where)


def test_many_pods_are_answered_by_one_look_and_no_descriptor_stays(node: Node) -> None:
    uids = [str(uuid.uuid4()) for _ in range(4)]
    places = [node.netns(f"198.18.201.{number}") for number in range(4)]
    for uid, place in zip(uids, places, strict=True):
        node.pod(uid, place)
    pods = [wanted(uid, f"198.18.201.{number}") for number, uid in enumerate(uids)]
    pods[3] = wanted(uids[3], "198.18.201.77")
    before = descriptors()
    answers = search([*pods, wanted(str(uuid.uuid4()))], [str(node.mounts)])
    found = [answer for answer in answers.values() if isinstance(answer, Netns)]
    assert [one.id.inode for one in found] == [inode(place) for place in places[:3]]
    assert [type(answer) for answer in answers.values()] == [Netns, Netns, Netns, ForeignNetnsError, NetnsError]
    assert len(descriptors()) == len(before) + 3
    for one in found:
        one.close()
    assert descriptors() == before


def test_p53_what_two_pods_would_get_neither_gets(node: Node) -> None:
    node.mount(node.netns(ADDRESS), "cni-1")
    uids = sorted(str(uuid.uuid4()) for _ in range(2))
    before = descriptors()
    answers = search([wanted(uid, ADDRESS) for uid in uids], [str(node.mounts)])
    for uid in uids:
        assert isinstance(answers[uid], ForeignNetnsError) and " and ".join(uids) in str(answers[uid])
    assert descriptors() == before


def test_a_path_that_was_unmounted_or_is_none_is_passed_over(node: Node, uid: str) -> None:
    where = node.netns(ADDRESS)
    pid = node.pod(uid, where)
    (node.mounts / "cni-0").touch()
    (node.mounts / "cni-1").symlink_to("/nowhere")
    found = find(wanted(uid, ADDRESS), str(node.mounts), str(node.mounts / "cni-0"), "/nowhere")
    found.close()
    assert found.origin == f"/proc/{pid}/ns/net"


def test_the_default_places_are_those_of_the_runtimes(node: Node, uid: str) -> None:
    assert searching.NETNS_DIRS == ("/run/netns", "/var/run/netns")
    where = node.netns(ADDRESS)
    node.pod(uid, where)
    found = find(wanted(uid, ADDRESS))
    found.close()
    assert found.origin == str(where)

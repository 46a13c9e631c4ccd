# SPDX-License-Identifier: Apache-2.0
"""Whose a process is by its cgroup, in the words of every driver and runtime, and of those who forge them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.sources.netns.cgroups import NO_OWNER, ProcessOwner, enclosing, owner

UID, OTHER = "5f0e7a52-41dd-4b0c-9d0e-3a6a3a0d9b11", "11111111-2222-3333-4444-555555555555"
SLICE, STATIC = UID.replace("-", "_"), "0123456789abcdef0123456789abcdef"
ID, INNER = "ab" * 32, "cd" * 32

FORMS = [
    (f"0::/kubepods/besteffort/pod{UID}/{ID}", ProcessOwner(UID, ID)),
    (f"0::/kubepods/pod{UID}/{ID}", ProcessOwner(UID, ID)),
    (f"0::/kubepods/burstable/pod{STATIC}/{ID}", ProcessOwner(STATIC, ID)),
    (f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice/cri-containerd-{ID}.scope",
     ProcessOwner(UID, ID)),
    (f"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{SLICE}.slice/cri-containerd-{ID}.scope",
     ProcessOwner(UID, ID)),
    (f"0::/kubepods.slice/kubepods-pod{SLICE}.slice/crio-{ID}.scope/container", ProcessOwner(UID, ID)),
    (f"0::/kubepods.slice/kubepods-pod{SLICE}.slice/crio-conmon-{ID}.scope", ProcessOwner(UID, ID)),
    (f"0::/kubepods.slice/kubepods-pod{SLICE}.slice/docker-{ID}.scope", ProcessOwner(UID, ID)),
    (f"1:name=systemd:/system.slice/containerd.service/kubepods-besteffort-pod{SLICE}.slice:cri-containerd:{ID}",
     ProcessOwner(UID, ID)),
    (f"0::/../../kubepods-besteffort-pod{SLICE}.slice/cri-containerd-{ID}.scope", ProcessOwner(UID, ID)),
    (f"0::/../../pod{UID}/{ID}", ProcessOwner(UID, ID)),
    (f"0::/../crio-{ID}.scope", ProcessOwner("", ID)),
    (f"0::/docker/{ID}", ProcessOwner("", ID)),
    (f"0::/system.slice/docker-{ID}.scope", ProcessOwner("", ID)),
    (f"0::/kubepods/besteffort/pod{UID}/{ID} (deleted)", ProcessOwner(UID, ID)),
    (f"0::/kubepods/besteffort/pod{UID}", ProcessOwner(UID)),
    ("0::/", NO_OWNER),
    ("0::/system.slice/podman.service", NO_OWNER),
    (f"0::/machine.slice/libpod{UID}", NO_OWNER),
    ("", NO_OWNER),
]  # fmt: skip


@pytest.mark.parametrize(("line", "whose"), FORMS)
def test_p54_every_form_names_its_pod_or_container(line: str, whose: ProcessOwner) -> None:
    assert owner(line + "\n") == whose


def test_hierarchies_agree_or_name_nobody() -> None:
    pod = f"2:memory:/kubepods/pod{UID}/{ID}\n1:name=systemd:/kubepods/pod{UID}/{ID}\n0::/\n"
    assert owner(pod) == ProcessOwner(UID, ID)
    assert owner(f"2:memory:/kubepods/pod{UID}/{ID}\n0::/system.slice/cri-containerd-{INNER}.scope") == ProcessOwner(
        UID, ID
    )
    assert owner(pod + f"3:pids:/kubepods/pod{OTHER}/{ID}") == NO_OWNER
    assert owner(f"1:a:/docker/{ID}\n2:b:/docker/{INNER}") == NO_OWNER


@pytest.mark.parametrize(
    "made", [f"/kubepods/pod{OTHER}/{INNER}", f"/pod{OTHER}", f"/docker/{INNER}", f"/x-pod{OTHER}.slice:crio:{INNER}"]
)
def test_p53_what_a_pod_makes_below_its_own_cgroup_says_nothing(made: str) -> None:
    assert owner(f"0::/kubepods/pod{UID}/{ID}{made}") == ProcessOwner(UID, ID)
    assert owner(f"0::/kubepods/pod{UID}{made}").uid == UID
    assert owner(f"0::/docker/{ID}{made}") == ProcessOwner("", ID)


def test_a_node_that_is_itself_a_container_is_passed() -> None:
    """kind and k3d: the node's own processes stand in a container, or in a pod of another cluster."""
    for node in (f"/docker/{INNER}", f"/kubepods/besteffort/pod{OTHER}/{INNER}", f"/x-pod{OTHER}.slice:docker:{INNER}"):
        outside = enclosing(f"0::{node}/init.scope\n")
        assert owner(f"0::{node}/kubelet/kubepods/pod{UID}/{ID}", outside) == ProcessOwner(UID, ID)
        assert owner(f"0::{node}/system.slice/sshd.service", outside) == NO_OWNER
    assert enclosing("0::/init.scope\n") == frozenset()


@given(st.text(), st.lists(st.sampled_from([f"pod{UID}", f"pod{OTHER}", ID, "x", "", ".."])))
def test_no_text_is_too_odd_and_the_outermost_pod_counts(text: str, parts: list[str]) -> None:
    assert owner(text) is not None and enclosing(text) is not None
    first = next((part for part in parts if len(part) > 2), "")
    expected = ProcessOwner("", ID) if first == ID else first.removeprefix("pod") if first else NO_OWNER
    found = owner("0::/" + "/".join(parts))
    assert found == expected if isinstance(expected, ProcessOwner) else found.uid == expected

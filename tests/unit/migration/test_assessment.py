# SPDX-License-Identifier: Apache-2.0
"""Findings: what is in the way, what a person should know, and that each comes with what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from agent.core.settings import Settings
from agent.install import planning
from agent.install.conflists import plugin_entry
from agent.install.planning import View, own
from agent.migration import assessment
from agent.migration.assessment import ACCEPTED, LEFT, NOTE, OBSTACLE, MigrationFinding
from agent.migration.migration_facts import ISTIO_CNI, SIDECAR, SLUICE, MigrationFacts, Programmed
from agent.migration.steps import after, take_over

HERE, PTP = Settings(), {"type": "ptp"}
ENTRY = plugin_entry(HERE)


def lists(*plugins: Any) -> bytes:
    return json.dumps({"cniVersion": "1.0.0", "name": "k8s", "plugins": [PTP, *plugins]}).encode()


ISTIO = {"type": "istio-cni", "ambient_enabled": True, "exclude_namespaces": ["kube-system"]}
NODE = MigrationFacts(
    directory="/etc/cni/net.d",
    plugins="/opt/cni/bin",
    view=View({"10-k8s.conflist": lists(), "02-istio-cni.conflist": lists(ISTIO)}),
    binary=True,
    ztunnels=1,
    programmed=(Programmed("/run/netns/a", ISTIO_CNI), Programmed("/run/netns/b", SLUICE)),
)


def judged(facts: MigrationFacts, mode: str = "own", here: Settings = HERE) -> list[MigrationFinding]:
    found = assessment.take_over_findings(facts, ENTRY, here, mode)
    assert all(one.todo for one in found if one.level == OBSTACLE)
    return [one for one in found if one.level != "fine"]


def test_a_node_as_it_should_be_has_nothing_in_the_way() -> None:
    assert judged(NODE) == []


CHANGES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"ours": "no such file"}, "agent", OBSTACLE, "no such file"),
    ({"agent": "process 7"}, "istio-cni", NOTE, "process 7"),
    ({"problems": ("/proc/7/ns/net: no",)}, "unseen", OBSTACLE, "/proc/7"),
    ({"binary": False}, "binary", NOTE, "missing"),
    ({"binary": False, "cached": 3}, "binary", OBSTACLE, "deletes 3 pods"),
    ({"cached": 3}, "binary", NOTE, "stays"),
    ({"programmed": (Programmed("/run/netns/s", SIDECAR, "shop/web"),)}, "sidecars", OBSTACLE, "shop/web"),
    ({"view": View({"10-k8s.conflist": lists({**ISTIO, "ambient_enabled": False})})}, "sidecars", OBSTACLE, "ambient"),
    ({"view": View()}, "configuration", OBSTACLE, "no CNI configuration"),
    ({"settings": {"AMBIENT_DNS_CAPTURE": "false"}}, "settings", OBSTACLE, "dns_capture: False (here: True)"),
    ({"settings": {"ENABLE_AMBIENT_DETECTION_RETRY": "false"}}, "settings", NOTE, "always"),
    ({"settings": {"cniBinDir": "/opt/other/bin"}}, "settings", OBSTACLE, "cni_bin_dir: /opt/other/bin"),
]


@pytest.mark.parametrize(("change", "subject", "level", "words"), CHANGES)
def test_what_is_found(change: dict[str, Any], subject: str, level: str, words: str) -> None:
    (one,) = judged(replace(NODE, **change))
    assert (one.subject, one.level) == (subject, level) and words in one.words
    (accepted,) = assessment.accepted([one], [subject])
    assert accepted.level == (ACCEPTED if level == OBSTACLE else level)


def test_entries_tell_the_settings_that_nobody_gave() -> None:
    view = View({"10-k8s.conflist": lists({**ISTIO, "exclude_namespaces": ["a", "b"]})})
    (one,) = judged(replace(NODE, view=view))
    assert "exclude_namespaces: ['a', 'b'] (here: kube-system)" in one.words
    assert judged(replace(NODE, view=view), here=Settings(exclude_namespaces=("b", "a"))) == []


def test_istio_cni_deep_inside_multus_is_told() -> None:
    multus = {"type": "multus", "name": "m", "cniVersion": "0.3.1", "delegates": [json.loads(lists(ISTIO))]}
    files = {"00-multus.conf": json.dumps(multus).encode(), "10-k8s.conflist": lists(ISTIO)}
    assert any("Multus may write" in one.words for one in judged(replace(NODE, view=View(files))))


LEFTS: list[tuple[dict[str, Any], str]] = [
    ({"agent": "process 7"}, "remove its DaemonSet"),
    ({"view": View(), "programmed": ()}, ""),
    ({"view": View()}, "sluice pods"),
    ({"view": View(), "programmed": (), "ztunnels": 0}, "check that ztunnel runs"),
    ({"view": View(), "programmed": (), "ztunnels": 0, "socket": False}, "restart the Sluice agent"),
]


@pytest.mark.parametrize(("change", "todo"), LEFTS)
def test_what_is_left_after_taking_over(change: dict[str, Any], todo: str) -> None:
    found = assessment.leftovers(replace(NODE, **change))
    assert all((one.subject, one.level) == (LEFT, NOTE) and one.todo for one in found)
    assert todo in found[0].todo if todo else not found


def test_the_way_back() -> None:
    view = after(NODE.view, take_over(NODE.view, ENTRY, HERE.cni_conf_name).steps)
    taken = replace(NODE, view=view, ours="stopped")

    def levels(facts: MigrationFacts) -> list[tuple[str, str]]:
        return [(one.subject, one.level) for one in assessment.back_findings(facts, HERE.cni_conf_name)]

    assert levels(taken) == [("configuration", "fine")]
    assert levels(replace(taken, ours="")) == [("agent", OBSTACLE), ("configuration", "fine")]
    assert levels(replace(taken, binary=False)) == [("binary", NOTE)]
    assert levels(replace(taken, view=View({"10-k8s.conflist": lists(ENTRY)}))) == [("configuration", NOTE)]


def test_what_is_left_after_handing_back() -> None:
    """istio-cni's agent that came back before ours went has our list for the primary one, and waits for it."""
    files = dict(NODE.view.files)
    ours = own(View({"10-k8s.conflist": lists()}), ENTRY, HERE.cni_conf_name)
    before = replace(NODE, view=planning.after(View({"10-k8s.conflist": lists()}), ours.actions), agent="process 7")
    theirs = json.loads(before.view.files[HERE.cni_conf_name])
    theirs["plugins"].append(ISTIO)
    before = replace(before, view=View({**before.view.files, HERE.cni_conf_name: json.dumps(theirs).encode()}))
    gone = replace(before, view=View(files))
    (one,) = assessment.leftovers_of_back(before, gone)
    assert HERE.cni_conf_name in one.words and "kubectl delete pod -n istio-system" in one.todo
    assert (
        assessment.leftovers_of_back(before, before)
        == assessment.leftovers_of_back(before, replace(gone, agent=""))
        == ()
    )
    (host,) = assessment.leftovers_of_back(NODE, replace(NODE, host=SLUICE))
    assert (host.subject, host.level) == ("host", OBSTACLE)

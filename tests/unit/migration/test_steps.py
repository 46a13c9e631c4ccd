# SPDX-License-Identifier: Apache-2.0
"""Steps from istio-cni to Sluice and back, over directories as they are found; looked at after each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.istioinstaller import IstioInstaller, Waits, picked

from agent.core.settings import Settings
from agent.install import conflists, planning
from agent.install.conflists import ISTIO, plugin_entry
from agent.install.planning import InstallPlan, View
from agent.migration import istio_confs
from agent.migration.steps import Steps, after, back, take_over, taken, until_istio_cni

ENTRY = plugin_entry(Settings())
WISHED = "02-sluice.conflist"
OURS = {"type": "istio-cni", "name": "istio-cni", "ambient_enabled": True, "exclude_namespaces": ["kube-system"]}


def network(*plugins: object, name: str = "kindnet", version: str = "0.3.1") -> bytes:
    return json.dumps({"cniVersion": version, "name": name, "plugins": list(plugins)}).encode()


PTP, PORTMAP = (
    {"type": "ptp", "ipam": {"type": "host-local"}},
    {"type": "portmap", "capabilities": {"portMappings": True}},
)
PRIMARY = network(PTP, PORTMAP)
CHAINED = network(PTP, PORTMAP, OURS)
CALICO, CALICO_ISTIO = (network({"type": "calico"}, *more, name="k8s-pod-network") for more in ((), (OURS,)))
MULTUS_ALONE = b'{"type": "multus", "name": "multus-cni-network", "cniVersion": "0.3.1", "delegates": []}'
MULTUS = json.dumps(
    {"type": "multus", "name": "multus-cni-network", "cniVersion": "0.3.1", "delegates": [json.loads(CHAINED)]}
).encode()

NODES = {
    "chained": {"10-kindnet.conflist": CHAINED},
    "owned": {"10-kindnet.conflist": PRIMARY, "02-istio-cni.conflist": CHAINED},
    "owned-of-another-name": {"10-kindnet.conflist": PRIMARY, "01-mesh.conflist": CHAINED},
    "owned-and-out-of-date": {"10-calico.conflist": CALICO, "02-istio-cni.conflist": CHAINED},
    "alone": {
        "10-kindnet.conflist": CHAINED,
        "YYY-istio-cni.conf": json.dumps({**OURS, "cniVersion": "0.3.1"}).encode(),
    },
    "two-lists": {"10-kindnet.conflist": CHAINED, "20-calico.conflist": CALICO},
    "both-with-it": {"10-kindnet.conflist": CHAINED, "20-calico.conflist": CALICO_ISTIO},
    "multus": {"00-multus.conf": MULTUS, "10-kindnet.conflist": CHAINED},
    "with-rubbish": {"00-empty.conflist": b"", "05-bad.conf": b"{", "10-kindnet.conflist": CHAINED},
}


def guarded(view: View) -> bool:
    """Whoever the runtime picks has one of the two in it: captured, or refused."""
    conf = istio_confs.picked(view)
    return conf is not None and (conflists.mentions(conf.network, ISTIO) or conflists.mentions(conf.network))


def states(view: View, steps: Steps) -> Iterator[View]:
    for count in range(len(steps.steps) + 1):
        yield after(view, steps.steps[:count])


def done(view: View, mode: str = "own") -> View:
    steps = take_over(view, ENTRY, WISHED, mode=mode)
    assert not steps.error
    return after(view, steps.steps)


@pytest.fixture(params=NODES)
def node(request: pytest.FixtureRequest) -> View:
    view = View(NODES[str(request.param)])
    assert guarded(view) and istio_confs.mentioning(view)
    return view


@pytest.mark.parametrize("mode", ["own", "insert"])
def test_after_each_step_of_taking_over_a_pod_is_captured_or_refused(node: View, mode: str) -> None:
    steps = take_over(node, ENTRY, WISHED, mode=mode)
    assert steps.steps and not steps.error
    for state in states(node, steps):
        assert guarded(state), sorted(state.files)
    end = after(node, steps.steps)
    conf = istio_confs.picked(end)
    assert conf is not None and conflists.mentions(conf.network) and not conflists.mentions(conf.network, ISTIO)
    assert not istio_confs.mentioning(end)


def ours_is_next(view: View) -> bool:
    """Ours is used, with istio-cni's entry in it, or as soon as istio-cni's own lists have gone."""
    conf = istio_confs.picked(view)
    assert conf is not None and conflists.mentions(conf.network, ISTIO)
    theirs = {
        conf.name
        for conf in istio_confs.confs(view)
        if not conflists.is_own(conf) and conflists.mentions(conf.network, ISTIO)
    }
    rest = istio_confs.picked(View({name: data for name, data in view.files.items() if name not in theirs}))
    return conflists.mentions(conf.network) or (rest is not None and conflists.mentions(rest.network))


def test_ours_is_there_before_anything_of_istio_cnis_goes(node: View) -> None:
    steps = take_over(node, ENTRY, WISHED).steps
    first = next(n for n, step in enumerate(steps) if step.action.name in node.files or "aside" in step.why)
    assert ours_is_next(after(node, steps[:first]))


@pytest.mark.parametrize("mode", ["own", "insert"])
def test_who_was_interrupted_goes_on_from_there(node: View, mode: str) -> None:
    steps = take_over(node, ENTRY, WISHED, mode=mode)
    end = after(node, steps.steps)
    for state in states(node, steps):
        again = take_over(state, ENTRY, WISHED, mode=mode)
        assert not again.error and all(guarded(one) for one in states(state, again))
        assert after(state, again.steps).files == end.files
    assert not take_over(end, ENTRY, WISHED, mode=mode).steps


@pytest.mark.parametrize("mode", ["own", "insert"])
def test_back_gives_the_same_bytes_and_is_captured_or_refused_after_each_step(node: View, mode: str) -> None:
    end = done(node, mode)
    steps = back(end, WISHED)
    assert steps.steps and not steps.error
    for state in states(end, steps):
        assert guarded(state), sorted(state.files)
        again = back(state, WISHED)
        assert not again.error and after(state, again.steps).files == after(end, steps.steps).files
    found, before = dict(after(end, steps.steps).files), dict(node.files)
    if before == NODES["owned-and-out-of-date"]:
        conf = istio_confs.picked(View(found))
        assert conf is not None and [one["type"] for one in conf.plugins] == ["calico", "istio-cni"]
        before["02-istio-cni.conflist"] = found["02-istio-cni.conflist"]
    assert found == before
    assert not back(after(end, steps.steps), WISHED).steps


def test_while_its_agent_runs_ours_comes_beside_and_nothing_of_it_is_touched(node: View) -> None:
    steps = take_over(node, ENTRY, WISHED, aside=False)
    end = after(node, steps.steps)
    assert steps.steps and {name: end.files[name] for name in node.files} == node.files
    assert ours_is_next(end)
    assert not take_over(end, ENTRY, WISHED, aside=False).steps


def test_after_its_agent_has_cleaned_up_itself_ours_follows() -> None:
    beside = after(View(NODES["owned"]), take_over(View(NODES["owned"]), ENTRY, WISHED, aside=False).steps)
    files = {name: data for name, data in beside.files.items() if name != "02-istio-cni.conflist"}
    end = done(View(files))
    conf = istio_confs.picked(end)
    assert conf is not None and conf.name == WISHED and not conflists.mentions(conf.network, ISTIO)
    assert set(end.files) == {WISHED, "10-kindnet.conflist"}


def test_what_istio_cnis_agent_makes_of_our_list_is_no_hindrance() -> None:
    """It takes the first list for the primary one: copies ours into its own, or puts its entry into ours."""
    ours = json.loads(done(View({"10-kindnet.conflist": PRIMARY})).files[WISHED])
    both = json.dumps({**ours, "plugins": [*ours["plugins"], OURS]}).encode()
    for files in (
        {"10-kindnet.conflist": PRIMARY, "02-istio-cni.conflist": both, WISHED: json.dumps(ours).encode()},
        {"10-kindnet.conflist": CHAINED, WISHED: both},
    ):
        steps = take_over(View(files), ENTRY, WISHED)
        assert not steps.error and all(map(guarded, states(View(files), steps)))
        end = after(View(files), steps.steps)
        conf = istio_confs.picked(end)
        assert conf is not None and conf.name == WISHED and [one["type"] for one in conf.plugins][2:] == ["sluice-cni"]
        assert not istio_confs.mentioning(end)
        again = back(end, WISHED)
        assert not again.error and all(map(guarded, states(end, again)))
        left = after(end, again.steps)
        assert not any(conflists.mentions(conf.network) for conf in istio_confs.confs(left)) and istio_confs.mentioning(
            left
        )


def test_what_the_primary_has_changed_meanwhile_stays_when_istio_cni_comes_back() -> None:
    newer = network(PTP, PORTMAP, {"type": "bandwidth"})
    for form in ("chained", "owned"):
        end = done(View(NODES[form]))
        view = replace(end, files={**end.files, "10-kindnet.conflist": newer})
        steps = back(view, WISHED)
        assert not steps.error and all(map(guarded, states(view, steps)))
        conf = istio_confs.picked(after(view, steps.steps))
        assert conf is not None
        assert [one["type"] for one in conf.plugins] == ["ptp", "portmap", "bandwidth", "istio-cni"]
        assert not [name for name in after(view, steps.steps).files if "sluice" in name]


def test_what_istio_cnis_agent_has_put_back_itself_is_its() -> None:
    end = done(View(NODES["owned"]))
    view = replace(end, files={**end.files, "02-istio-cni.conflist": network(PTP, PORTMAP, {**OURS, "newer": True})})
    steps = back(view, WISHED)
    files = after(view, steps.steps).files
    assert b"newer" in files["02-istio-cni.conflist"] and set(files) == {"10-kindnet.conflist", "02-istio-cni.conflist"}


def test_without_istio_cni_there_is_no_way_back() -> None:
    view = View({"10-kindnet.conflist": PRIMARY})
    steps = back(done(view), WISHED)
    assert "uncaptured" in steps.error and not steps.steps


def test_without_a_primary_nothing_is_taken_out() -> None:
    only = View({"YYY-istio-cni.conf": json.dumps({**OURS, "cniVersion": "0.3.1"}).encode()})
    assert "primary" in take_over(only, ENTRY, WISHED).error
    assert "no CNI configuration" in take_over(View(), ENTRY, WISHED).error


def test_a_node_without_istio_cni_is_just_installed() -> None:
    steps = take_over(View({"10-kindnet.conflist": PRIMARY}), ENTRY, WISHED)
    assert [step.action.name for step in steps.steps] == [WISHED]


def test_steps_print_what_and_why() -> None:
    words = [str(step) for step in take_over(View(NODES["owned"]), ENTRY, WISHED).steps]
    assert words[1] == (
        "rename 02-istio-cni.conflist to .sluice-istio-file-02-istio-cni.conflist.kept"
        "  # keep istio-cni's own file (owned)"
    )


def test_no_runtime_reads_what_is_kept(node: View) -> None:
    hidden = set(done(node).files) - set(conflists.readable(done(node).files))
    assert hidden and all(name.startswith(".sluice-istio-") and name.endswith(".kept") for name in hidden)


LISTS = {
    "chained": ("", {"10-kindnet.conflist": PRIMARY}),
    "chained-in-a-conf": ("", {"10-kindnet.conf": json.dumps({**PTP, "name": "k", "cniVersion": "0.3.1"}).encode()}),
    "owned": ("02-istio-cni.conflist", {"10-kindnet.conflist": PRIMARY}),
    "owned-after-ours": ("05-istio-cni.conflist", {"10-kindnet.conflist": PRIMARY}),
    "owned-beside-multus": ("00-istio-cni.conflist", {"00-multus.conf": MULTUS_ALONE, "10-kindnet.conflist": PRIMARY}),
}


def apply(files: dict[str, bytes], steps: Steps | InstallPlan) -> int:
    """Carries it out; a pod that starts is captured or refused after each step. How many there were."""
    actions = [step.action for step in steps.steps] if isinstance(steps, Steps) else list(steps.actions)
    for count in range(len(actions)):
        assert guarded(planning.after(View(files), actions[: count + 1]))
    done = dict(planning.after(View(files), actions).files)
    files.clear()
    files.update(done)
    return len(actions)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("form", LISTS)
def test_both_agents_installers_leave_each_other_alone_there_and_back(form: str, restarted: bool) -> None:
    """istio-cni's agent runs, ours comes, istio-cni's goes; then ours goes, and istio-cni's comes."""
    owned, files = LISTS[form][0], dict(LISTS[form][1])
    theirs = IstioInstaller(owned)
    theirs.settle(files)
    before = dict(files)
    assert theirs.settle(files) == 0 and apply(files, planning.own(View(files), ENTRY, WISHED))
    theirs = IstioInstaller(owned) if restarted else theirs
    theirs.settle(files)
    apply(files, planning.own(View(files), ENTRY, WISHED))
    assert theirs.settle(files) == 0, "it has nothing to do as long as nobody else has"
    assert "istio-cni" in picked(files)

    theirs.clean_up(files)
    assert guarded(View(files)) and "sluice-cni" in picked(files), "without a moment between"
    apply(files, planning.own(View(files), ENTRY, WISHED))
    apply(files, take_over(View(files), ENTRY, WISHED))
    assert picked(files)[-1] == "sluice-cni" and "istio-cni" not in picked(files)

    assert apply(files, until_istio_cni(View(files), ENTRY, WISHED)) and "sluice-cni" in picked(files)
    assert not apply(files, until_istio_cni(View(files), ENTRY, WISHED))
    theirs = IstioInstaller(owned)
    theirs.settle(files)
    assert theirs.settle(files) == 0 and {"istio-cni", "sluice-cni"} <= set(picked(files)), "refused as long as both"
    assert apply(files, back(View(files), WISHED)) and not taken(View(files))
    assert theirs.settle(files) == 0 and picked(files) == [one for one in picked(before) if one != "sluice-cni"]
    assert not any(b"sluice" in data or "sluice" in name for name, data in files.items())


@pytest.mark.parametrize("form", LISTS)
def test_istio_cni_that_came_back_before_ours_went_has_to_be_restarted(form: str) -> None:
    owned, files = LISTS[form][0], dict(LISTS[form][1])
    apply(files, planning.own(View(files), ENTRY, WISHED))
    theirs = IstioInstaller(owned)
    theirs.settle(files)
    ours = taken(View(files))
    assert ours in files and "sluice-cni" in picked(files)
    assert apply(files, back(View(files), WISHED)) and ours not in files
    assert picked(files)[-1] == "istio-cni" and "sluice-cni" not in picked(files)
    with pytest.raises(Waits, match=ours):
        theirs.settle(files)
        theirs.settle({name: data for name, data in files.items() if name != owned})
    assert IstioInstaller(owned).settle(files, 5) < 5 and picked(files)[-1] == "istio-cni"

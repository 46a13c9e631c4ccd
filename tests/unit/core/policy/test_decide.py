# SPDX-License-Identifier: Apache-2.0
"""The policy: each rule of enrolment, each exclusion with its reason, each annotation."""

from __future__ import annotations

from typing import Any

import pytest

from agent.core.model.pods import Pod
from agent.core.model.redirect import Redirect
from agent.core.policy.decide import Decision, decide, enrols_namespace
from agent.core.settings import Settings, build

MODE = "istio.io/dataplane-mode"
AMBIENT, NONE = {MODE: "ambient"}, {MODE: "none"}
DNS, BYPASS = "ambient.istio.io/dns-capture", "ambient.istio.io/bypass-inbound-capture"
INTERFACES = "istio.io/reroute-virtual-interfaces"


def pod(**facts: Any) -> Pod:
    return Pod(**{"uid": "u", "namespace": "shop", "name": "web", **facts})


def annotated(**annotations: str) -> Pod:
    return pod(labels=AMBIENT, annotations=annotations)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"namespace_labels": AMBIENT}, f"namespace shop says {MODE}=ambient"),
        ({"labels": AMBIENT}, f"the pod says {MODE}=ambient"),
        ({"annotations": AMBIENT}, f"the pod says {MODE}=ambient"),
        ({"labels": AMBIENT, "annotations": NONE, "namespace_labels": NONE}, f"the pod says {MODE}=ambient"),
        ({"labels": {MODE: "other"}, "namespace_labels": AMBIENT}, f"namespace shop says {MODE}=ambient"),
    ],
)
def test_enrolled(facts: dict[str, Any], reason: str) -> None:
    decision = decide(pod(**facts), Settings())
    assert decision.enrolled and decision.redirect == Redirect()
    assert (decision.reason, decision.warnings) == (reason, ())


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, f"neither the pod nor its namespace says {MODE}=ambient"),
        ({"namespace_labels": NONE}, f"neither the pod nor its namespace says {MODE}=ambient"),
        ({"labels": {MODE: "Ambient"}}, f"neither the pod nor its namespace says {MODE}=ambient"),
        ({"labels": NONE, "annotations": AMBIENT, "namespace_labels": AMBIENT}, f"the pod says {MODE}=none"),
        ({"annotations": NONE, "namespace_labels": AMBIENT}, f"the pod says {MODE}=none"),
    ],
)
def test_not_enrolled(facts: dict[str, Any], reason: str) -> None:
    decision = decide(pod(**facts), Settings())
    assert not decision.enrolled and decision.redirect is None and decision.reason == reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"host_network": True}, "it shares the host's network"),
        ({"annotations": {"sidecar.istio.io/status": ""}}, "it has a sidecar (annotation sidecar.istio.io/status)"),
        ({"labels": {**AMBIENT, "app": "ztunnel"}}, "it is ztunnel itself"),
        ({"namespace": "kube-system"}, "namespace kube-system is excluded by the setting exclude_namespaces"),
        ({"terminal": True}, "it has ended"),
    ],
)
def test_never_enrolled_whatever_the_labels_say(facts: dict[str, Any], reason: str) -> None:
    decision = decide(pod(**{"labels": AMBIENT, "namespace_labels": AMBIENT, **facts}), Settings())
    assert (decision.redirect, decision.reason) == (None, reason)


def test_excluded_namespaces_are_a_setting() -> None:
    settings = Settings(exclude_namespaces=("shop",))
    assert not decide(pod(labels=AMBIENT), settings).enrolled
    assert decide(pod(namespace="kube-system", labels=AMBIENT), settings).enrolled


def test_settings_reach_the_redirect() -> None:
    settings = Settings(ipv6=False, dns_capture=False, probe_ipv4="10.0.0.1", probe_ipv6="fd00::1")
    got = decide(pod(labels=AMBIENT), settings).redirect
    assert got == Redirect(ipv6=False, dns=False, probe_ipv4="10.0.0.1", probe_ipv6="fd00::1")


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(
    ("text", "value"),
    [(t, True) for t in ("1", "t", "T", "TRUE", "true", "True")]
    + [(f, False) for f in ("0", "f", "F", "FALSE", "false", "False")],
)
def test_flags_are_read_as_go_reads_them(text: str, value: bool, default: bool) -> None:
    decision = decide(annotated(**{DNS: text, BYPASS: text}), Settings(dns_capture=default))
    assert decision.redirect == Redirect(dns=value, ingress_only=value) and decision.warnings == ()


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize("text", ["", "yes", "tRUE", " true", "2", "x" * 200])
def test_what_is_no_flag_counts_as_absent_and_is_told(text: str, default: bool) -> None:
    decision = decide(annotated(**{DNS: text, BYPASS: text}), Settings(dns_capture=default))
    assert decision.redirect == Redirect(dns=default, ingress_only=False)
    assert [warning.split(":")[0] for warning in decision.warnings] == [f"annotation {DNS}", f"annotation {BYPASS}"]
    assert all(len(warning) < 160 for warning in decision.warnings)


@pytest.mark.parametrize(
    ("text", "names"),
    [("", ()), ("br0", ("br0",)), (" br0 , tap1,br0,, ", ("br0", "tap1")), ("e.1,a-b,a_b@c", ("e.1", "a-b", "a_b@c"))],
)  # fmt: skip
def test_virtual_interfaces(text: str, names: tuple[str, ...]) -> None:
    decision = decide(annotated(**{INTERFACES: text}), Settings())
    assert decision.redirect == Redirect(virtual_interfaces=names) and decision.warnings == ()


@pytest.mark.parametrize("bad", ["x" * 16, "a b", "a;reboot", '"', "../x", "-j", "é", "a\n", "+"])
def test_bad_interface_names_are_told_and_the_others_used(bad: str) -> None:
    decision = decide(annotated(**{INTERFACES: f"br0,x{bad}x,tap1" if bad == "a\n" else f"br0,{bad},tap1"}), Settings())
    assert decision.redirect == Redirect(virtual_interfaces=("br0", "tap1"))
    (warning,) = decision.warnings
    assert warning.startswith(f"annotation {INTERFACES}: ") and "\n" not in warning


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"namespace": "sluice-system"}, "namespace sluice-system is the agent's own"),
        ({"name": "node-agent-x"}, "it is named by the setting exempt_pods"),
        ({"name": "exactly"}, "it is named by the setting exempt_pods"),
        ({"runtime_class": "gvisor"}, "its runtime class gvisor has a network stack of its own"),
    ],
)
def test_never_by_the_settings_whatever_the_pod_says(facts: dict[str, Any], reason: str) -> None:
    settings = Settings(own_namespace="sluice-system", exempt_pods=("shop/node-agent-*", "shop/exactly"))
    decision = decide(pod(labels=AMBIENT, **facts), settings)
    assert (decision.enrolled, decision.reason) == (False, reason)
    assert decide(pod(labels=AMBIENT, name="exactly-not", runtime_class="runc"), settings).enrolled


def test_selectors_of_the_settings_decide_instead_of_the_default() -> None:
    value = [{"podSelector": {"matchLabels": {"mesh": "on"}}, "namespaceSelector": {"matchLabels": {"team": "a"}}}]
    settings = build({"enablement_selectors": (value, "f:1")})
    assert decide(pod(labels={"mesh": "on"}, namespace_labels={"team": "a"}), settings) == Decision(
        Redirect(), "the setting enablement_selectors has: pod mesh=on, namespace team=a"
    )
    for facts in ({"labels": {"mesh": "on"}}, {"labels": AMBIENT, "namespace_labels": {"team": "a"}}):
        assert decide(pod(**facts), settings).reason == "nothing in the setting enablement_selectors fits"


def test_which_namespaces_enrol_their_pods() -> None:
    settings = Settings()
    assert enrols_namespace(AMBIENT, settings)
    assert not enrols_namespace(NONE, settings) and not enrols_namespace({}, settings)


def test_more_interfaces_than_a_pod_may_name_are_refused_and_the_pod_stays_enrolled() -> None:
    decision = decide(annotated(**{INTERFACES: ",".join(f"v{n}" for n in range(257))}), Settings())
    assert decision.enrolled and "more than 256 interfaces" in decision.refused
    assert not decide(annotated(**{INTERFACES: ",".join(f"v{n}" for n in range(256))}), Settings()).refused


def test_what_is_wrong_in_a_list_of_interfaces_is_one_warning() -> None:
    decision = decide(
        annotated(**{INTERFACES: "a/b," * 2 + "eth1," + ",".join(f"{n}/x" for n in range(9))}), Settings()
    )
    assert decision.redirect is not None and decision.redirect.virtual_interfaces == ("eth1",)
    assert len(decision.warnings) == 1 and "'a/b' and 9 more" in decision.warnings[0]


def test_lists_that_multiply_are_refused_beyond_what_fits_into_a_transaction() -> None:
    def decided(interfaces: int) -> Decision:
        ports = ",".join(str(2 * n + 1) for n in range(256))
        named = {
            INTERFACES: ",".join(f"v{n}" for n in range(interfaces)),
            "traffic.sluice.io/exclude-outbound-ports": ports,
        }
        return decide(annotated(**named), Settings())

    assert not decided(16).refused
    assert "17 interfaces, and 256 destinations" in decided(17).refused and decided(17).enrolled

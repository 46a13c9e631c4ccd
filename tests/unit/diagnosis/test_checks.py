# SPDX-License-Identifier: Apache-2.0
"""Each check: right where all is right, and told of with cause and remedy where it is not."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support.healthynode import (
    AWAY,
    CNI,
    GOOD,
    ISTIOS,
    LEGACY,
    OURS,
    POD,
    PRIMARY,
    RIGHT,
    agent,
    cni,
    feature,
    node,
    pod,
    rows,
    settings,
    sockets,
    status,
    sysctl,
    view,
)

from agent.__main__ import _GROUPS as COMMANDS
from agent.core.model.host import Variant
from agent.core.settings import Settings
from agent.diagnosis.checks import CHECKS
from agent.diagnosis.finding import CheckResult, CheckVerdict, examine, examine_all, exit_code
from agent.diagnosis.node_facts import (
    AttachedProgram,
    Cni,
    HostFacts,
    Left,
    Listed,
    NodeFacts,
    PodsFacts,
    Preflight,
    Security,
)
from agent.install import planning
from agent.install.planning import View, Write

WRONG, WARNING, UNKNOWN, OK = CheckVerdict.WRONG, CheckVerdict.WARNING, CheckVerdict.UNKNOWN, CheckVerdict.OK
INSERTED = planning.InstallPlan(actions=(Write("02-sluice.conflist", b"x"),), file="02-sluice.conflist")
AVC = 'audit: avc: denied { connectto } for pid=9 comm="sluice-cni" permissive=0'
CASES: list[tuple[str, str, NodeFacts, CheckVerdict, str]] = [
    ("agent", "not ready", status(ready=False, problem="the CNI plugin is not installed"), WRONG, "not installed"),
    ("agent", "degraded", status(problem="no ztunnel is connected"), WARNING, "no ztunnel"),
    ("agent", "away, pods wait", AWAY, WRONG, "Connection refused"),
    (
        "agent",
        "never here",
        replace(
            AWAY,
            cni=Cni(managed="off", directory="", directory_reason="", plugins="", plugins_reason=""),
            left=Left(why="away"),
        ),
        UNKNOWN,
        "nothing of",
    ),
    ("agent-version", "an older one runs", status(version="0.0.1"), WARNING, "the agent is 0.0.1"),
    ("agent-version", "away", AWAY, UNKNOWN, "cannot ask"),
    ("agent-state", "damaged", replace(GOOD, left=replace(GOOD.left, damaged=("u.damaged",))), WRONG, "u.damaged"),
    ("agent-state", "as it tells", status(damaged_state_files=["v.json"]), WRONG, "v.json"),
    ("agent-resources", "descriptors used up", agent(descriptors=19000), WRONG, "19000 of 20000"),
    ("agent-resources", "descriptors leak", agent(descriptors=2000), WARNING, "2000 descriptors"),
    ("agent-resources", "memory", agent(resident=400 << 20), WARNING, "400 MiB"),
    ("agent-resources", "hidden", agent(pid=0), UNKNOWN, "cannot be seen"),
    ("kubernetes", "refused", status(kubernetes="403 Forbidden"), WRONG, "403"),
    ("static-pods", "damaged file", status(static_pods="pods.yaml:3: not YAML"), WRONG, "pods.yaml:3"),
    (
        "leaks",
        "leaked",
        status(connections=[{"direction": "outbound", "fate": "leaked", "reason": "no rules", "connections": 3}]),
        WARNING,
        "3 no rules",
    ),
    ("records", "lost", agent(losses={"records": 4}), WARNING, "4 records"),
    ("cni-configuration", "primary sorts first", cni(files=(PRIMARY, OURS)), WRONG, "10-kindnet.conflist (ptp > port"),
    ("cni-configuration", "ours was dropped", cni(files=(PRIMARY,)), WRONG, "does not have sluice-cni"),
    ("cni-configuration", "out of date", cni(verdict=INSERTED), WRONG, "write 02-sluice.conflist"),
    ("cni-configuration", "nothing there", cni(files=()), WRONG, "no CNI conf"),
    ("cni-configuration", "refused", cni(verdict=planning.InstallPlan(error="10-x: not JSON")), WRONG, "not JSON"),
    ("cni-configuration", "directory hidden", cni(error="/etc/cni/net.d: Permission denied"), WRONG, "Permission"),
    ("cni-configuration", "remarks", cni(verdict=replace(CNI.verdict, remarks=("not used: 01-x",))), WARNING, "01-x"),
    ("cni-configuration", "istio-cni's own first", cni(files=(ISTIOS, OURS, PRIMARY)), OK, "02-sluice.conflist: ptp"),
    ("cni-configuration", "istio-cni's own alone", cni(files=(ISTIOS, PRIMARY)), WRONG, "does not have sluice-cni"),
    ("cni-configuration", "by other means", cni(managed="off", files=(PRIMARY,)), OK, "cni_install is off"),
    ("cni-primary", "Cilium renamed ours", cni(view=View({"02-sluice.conflist.cilium_bak": b""})), WRONG, "cilium_bak"),
    ("cni-primary", "two primaries", cni(files=(OURS, PRIMARY, Listed("20-x.conf", ("flannel",)))), WARNING, "20-x"),
    ("cni-directories", "nobody said", cni(directory_reason="the default: no configuration of"), WARNING, ""),
    ("cni-plugin", "missing", cni(plugin="/opt/cni/bin/sluice-cni is not there"), WRONG, "is not there"),
    ("cni-plugin", "noexec", cni(runs="Permission denied"), WRONG, "Permission denied"),
    ("cni-plugin", "not wanted", cni(managed="off", files=(PRIMARY,), plugin="x"), OK, "no CNI list names sluice-cni"),
    ("cni-runtime", "blind", cni(watched=False), WRONG, "another directory"),
    ("cni-runtime", "hidden", cni(watched=None), UNKNOWN, "cannot be read"),
    ("cni-runtime", "none", cni(runtime=""), UNKNOWN, "no container runtime"),
    ("istio-cni", "it runs", cni(istio="process 9, install-cni"), WARNING, "install-cni"),
    ("istio-cni", "chained", cni(files=(Listed("10-x.conflist", ("ptp", "istio-cni")),)), WARNING, "10-x.conflist"),
    ("backend", "not chosen", replace(AWAY, left=Left(why="away")), UNKNOWN, "no backend"),
    ("backend", "record differs", replace(GOOD, left=replace(GOOD.left, backend="iptables")), WARNING, "on disk"),
    ("backend", "not as set", settings(backend="ebpf"), WARNING, "nftables"),
    ("backend", "new kernel", replace(GOOD, left=replace(GOOD.left, release="6.1")), WARNING, "6.1"),
    ("preflight", "nothing works", replace(GOOD, preflight=Preflight("", "no backend can be used")), WRONG, "no back"),
    ("preflight", "self-test", replace(GOOD, preflight=Preflight("nftables", "", (), ("not captured",))), WRONG, "not"),
    ("preflight", "needed", feature(), WRONG, "Operation not supported"),
    ("preflight", "optional", feature(without="users cannot be excluded"), WARNING, "meta mark"),
    ("host-tables", "both variants", view(legacy=LEGACY), WARNING, "4 rules of iptables-nft and 3 of legacy"),
    ("host-tables", "flipped", view(iptables=Variant.LEGACY), WARNING, "legacy one"),
    ("host-tables", "unreadable", view(nft=None), UNKNOWN, "cannot be read"),
    ("rule-sets", "two of ours", pod(ours=("nftables", "iptables")), WRONG, "nftables and iptables"),
    ("rule-sets", "istio-cni's too", pod(others=("iptables",)), WRONG, "another agent"),
    ("rule-sets", "istio-cni's alone", pod(ours=(), others=("iptables",)), WARNING, "alone"),
    ("rule-sets", "sidecar", pod(sidecar=True), WRONG, "sidecar"),
    (
        "host-rules",
        "pod rules on the host",
        replace(GOOD, host=replace(GOOD.host, pod_rules=("chain ISTIO_OUTPUT",))),
        WRONG,
        "ISTIO_OUTPUT",
    ),
    ("probe-exemption", "off", status(host_probes={"mechanism": "off"}), WARNING, "captured"),
    ("probe-exemption", "fails", status(host_probes={"mechanism": "iptables", "error": "no ipset"}), WRONG, "no ipset"),
    ("probe-exemption", "flushed", replace(AWAY, host=replace(GOOD.host, probes=())), WRONG, "no probe exemption"),
    ("probe-exemption", "alone", AWAY, OK, "no agent maintains it"),
    ("firewall", "firewalld", node(firewalls=("firewalld",)), WARNING, "firewalld"),
    ("probe-path", "Cilium", node(cilium={"enable-bpf-masquerade": "true"}), WARNING, "enable-bpf-masquerade"),
    ("probe-path", "Calico", node(felix_bpf=True), WARNING, "FELIX_BPFENABLED"),
    (
        "reverse-path",
        "strict on branch interfaces",
        replace(sysctl("net.ipv4.conf.all.rp_filter", "1"), host=replace(GOOD.host, probes=("branch-eni",))),
        WARNING,
        "strict",
    ),
    ("ipv6", "off by the setting, pods have it", settings(ipv6=False), WRONG, "1 pods"),
    ("ipv6", "off at boot", node(ipv6_off=True), OK, "ipv6.disable=1"),
    ("ztunnel", "none", status(ztunnel_connections=0), WRONG, "no ztunnel"),
    (
        "ztunnel",
        "socket taken away",
        replace(status(ztunnel_connections=0), left=replace(GOOD.left, zds="")),
        WRONG,
        "is not there",
    ),
    ("ztunnel", "a directory", replace(GOOD, left=replace(GOOD.left, zds="a directory")), WRONG, "a directory"),
    ("ztunnel", "two", status(ztunnel_connections=2), WARNING, "2 ztunnels"),
    ("ztunnel", "busy", status(ztunnel_unacknowledged=5), WARNING, "5 pods wait"),
    ("ztunnel", "away", AWAY, UNKNOWN, "no agent"),
    ("ztunnel-listening", "silent", pod(silent=(15001, 15006)), WRONG, "15001, 15006"),
    ("pod-loopback", "down", pod(loopback4=False), WRONG, "lo is down"),
    ("pod-loopback", "no ::1", pod(loopback6=False), WARNING, "no ::1"),
    ("pod-loopback", "off for lo alone", pod(ipv6=False), WARNING, "fd00::2"),
    ("pods", "failed", rows(state="failed", error="nft: Operation not supported"), WRONG, "Operation not supported"),
    ("pods", "pending", rows(state="pending", error="no ztunnel"), WRONG, "no ztunnel"),
    ("pods", "stalled", rows(state="stalled", error="3 on port 15001"), WRONG, "3 on port 15001"),
    ("pods", "waiting", rows(state="waiting", error="not found"), WARNING, "not found"),
    ("pod-rules", "flushed", replace(AWAY, pods=PodsFacts((replace(POD, ours=()),))), WRONG, "no rules in"),
    ("pod-rules", "gone", pod(error="its network namespace is not there any more"), WARNING, "not there"),
    (
        "pod-rules",
        "nobody's",
        replace(GOOD, pods=PodsFacts((POD,), (replace(POD, origin="/proc/9/ns/net"),))),
        WARNING,
        "/proc/9",
    ),
    (
        "pods-verified",
        "past us",
        agent(verify=({**RIGHT, "state": "bypassing", "result": "drift", "error": "runs"},)),
        WRONG,
        "shop/web: runs",
    ),
    (
        "pods-verified",
        "drift",
        agent(verify=({**RIGHT, "result": "drift", "differences": ["nat: missing"]},)),
        WRONG,
        "nat: missing",
    ),
    ("pods-verified", "unknown", agent(verify=({**RIGHT, "result": "unknown", "error": "gone"},)), UNKNOWN, "gone"),
    ("foreign-rules", "before ours", pod(foreign=("chain ip x y, priority -150",)), WARNING, "priority -150"),
    ("probe-canary", "failed", rows(probe="probe from the node on 10.0.0.2:80: failed: timed out"), WRONG, "timed out"),
    (
        "probe-canary",
        "captured",
        rows(probe="probe from the node on 10.0.0.2:80: captured: redirected"),
        WRONG,
        "redir",
    ),
    ("probe-canary", "none yet", rows(probe=""), UNKNOWN, "no pod"),
    ("probe-canary", "off", replace(rows(probe=""), settings=Settings(probe_canary="off")), UNKNOWN, "is off"),
    ("pod-runtimes", "gVisor, not excluded", node(shims=("containerd-shim-runsc-v1",)), WARNING, "runsc"),
    ("pod-runtimes", "Kata", node(shims=("containerd-shim-kata-v2",)), WARNING, "Kata"),
    ("pod-ports", "in the range", pod(ports=(40000,)), WARNING, "40000"),
    ("pod-sockets", "left over", pod(states={"CLOSE_WAIT": 19059}), WARNING, "19059"),
    ("pod-sockets", "ports used up", pod(states={"ESTABLISHED": 28000}), WARNING, "28000"),
    (
        "socket-balancer",
        "Cilium",
        sockets(AttachedProgram("connect4", "cil_sock4_connect", 9)),
        WARNING,
        "cil_sock4_connect",
    ),
    ("socket-balancer", "Calico", sockets(AttachedProgram("connect4", "calico_connect", 9)), WARNING, "calico_connect"),
    ("socket-balancer", "somebody", sockets(AttachedProgram("sendmsg4", "mine", 9)), WARNING, "mine (sendmsg4)"),
    (
        "socket-balancer",
        "pods left alone",
        replace(
            sockets(AttachedProgram("connect4", "cil_sock4_connec", 9)),
            node=HostFacts(cilium={"bpf-lb-sock-hostns-only": "true"}),
        ),
        OK,
        "not affected",
    ),
    ("socket-balancer", "replacement", node(cilium={"kube-proxy-replacement": "true"}), WARNING, "kube-proxy"),
    ("security", "AVC", replace(GOOD, security=Security(selinux="enforcing", denials=(AVC,))), WRONG, "avc: denied"),
    (
        "security",
        "AppArmor",
        replace(GOOD, security=Security(denials=('apparmor="DENIED" name="sluice"',))),
        WRONG,
        "DEN",
    ),
    (
        "security",
        "confined",
        replace(GOOD, security=Security(selinux="enforcing", context="container_t")),
        WARNING,
        "container_t",
    ),
    ("security", "unread", replace(GOOD, security=Security(unread="/dev/kmsg: Permission denied")), UNKNOWN, "kmsg"),
    ("inotify", "used up", node(inotify="inotify_init1: Too many open files"), WRONG, "Too many"),
    ("inotify", "soon", node(inotify_used=120), WARNING, "120 of 128"),
    ("conntrack", "nearly full", sysctl("net.netfilter.nf_conntrack_count", "900"), WARNING, "900 of 1000"),
    ("conntrack", "not loaded", node(sysctls={}), UNKNOWN, "not loaded"),
    (
        "metrics-port",
        "taken",
        replace(GOOD, host=replace(GOOD.host, port="istio[9]", port_ours=False)),
        WRONG,
        "istio[9]",
    ),
    ("metrics-port", "silent", replace(GOOD, host=replace(GOOD.host, port="", port_ours=False)), WARNING, "nothing"),
]


def of(name: str, facts: NodeFacts) -> tuple[CheckResult, ...]:
    return examine(next(one for one in CHECKS if one.id == name), facts)


def test_where_all_is_right_every_check_is_ok() -> None:
    found = examine_all(CHECKS, GOOD)
    assert {one.check: (one.verdict, one.found) for one in found if one.verdict is not OK} == {}
    assert [one.check for one in found] == [one.id for one in CHECKS]
    assert all(one.found and not one.remedy for one in found)
    assert exit_code(found) == 0


@pytest.mark.parametrize(
    ("name", "what", "facts", "verdict", "words"), CASES, ids=lambda one: one if isinstance(one, str) else ""
)
def test_check(name: str, what: str, facts: NodeFacts, verdict: CheckVerdict, words: str) -> None:
    found = of(name, facts)
    worst = [one for one in found if one.verdict is verdict]
    assert worst, found
    assert any(words in one.found for one in worst), found
    if verdict in (WRONG, WARNING):
        assert all(one.cause and one.remedy for one in worst)
        assert not any(one.verdict is OK for one in found), "a check that found something says nothing of ok beside it"
    assert exit_code(found) == (verdict is WRONG)


def test_every_check_has_a_case_that_is_not_ok() -> None:
    told = {name for name, _, _, verdict, _ in CASES if verdict is not OK}
    assert {one.id for one in CHECKS} == told


def test_what_could_not_be_seen_is_unknown_with_the_reason_and_no_failure() -> None:
    groups = {name for one in CHECKS for name in one.needs}
    found = examine_all(CHECKS, replace(GOOD, unseen=dict.fromkeys(groups, "not root")))
    needing = {one.id for one in CHECKS if one.needs}
    assert {one.check for one in found if one.verdict is UNKNOWN and one.found.startswith("not root")} == needing
    assert exit_code(found) == 0


def test_what_has_a_check_of_its_own_is_told_once() -> None:
    row = {**RIGHT, "namespace": "", "name": "(ztunnel)", "result": "drift", "error": "no ztunnel"}
    assert [one.verdict for one in of("pods-verified", agent(verify=(row,)))] == [OK]
    failed = {**RIGHT, "state": "failed", "result": "drift", "error": "refused"}
    assert [one.verdict for one in of("pods-verified", agent(verify=(failed,)))] == [OK]


def test_found_is_one_line_whatever_is_in_it() -> None:
    (found,) = of("pods", rows(state="failed", error="first\n\tsecond  third"))
    assert found.found == "shop/web: first second third"


def test_commands_that_are_told_of_exist() -> None:
    said = [text for name, _, facts, _, _ in CASES for one in of(name, facts) for text in (one.remedy, one.cause)]
    words = {word for text in said for word in re.findall(r"\bsluice ([a-z]+)\b", text)}
    checks = {
        word for text in said for run in re.findall(r"sluice doctor ((?:[a-z-]+ ?)+)", text) for word in run.split()
    }
    assert words <= set(COMMANDS), words - set(COMMANDS)
    assert checks <= {one.id for one in CHECKS}, checks
    known = set(Settings.__slots__)
    named = {word for text in said for word in re.findall(r"\bset ([a-z_]+)(?::| to | lower)", text)}
    assert named <= known, named - known


def test_checks_are_named_once_and_name_rows_of_the_list() -> None:
    assert len({one.id for one in CHECKS}) == len(CHECKS)
    for one in CHECKS:
        assert re.fullmatch(r"[a-z0-9-]+", one.id)
        assert all(re.fullmatch(r"P[0-6]\d[a-p]?", row) for row in one.problems)


def test_remedies_are_commands_of_where_the_agent_runs() -> None:
    """A pod of a cluster is no unit of systemd."""
    stale = status(ready=False, problem="it waits", version="0.0.1", ztunnel_connections=0)
    units = " ".join(one.remedy for one in examine_all(CHECKS, stale))
    assert "systemctl restart sluice-ztunnel" in units and "kubectl" not in units
    pods = replace(stale, settings=replace(stale.settings, own_namespace="mesh"))
    remedies = [one.remedy for one in examine_all(CHECKS, pods)]
    assert "systemctl" not in " ".join(remedies)
    selected = "-l app.kubernetes.io/name=sluice,app.kubernetes.io/component=agent --field-selector spec.nodeName=n1"
    assert f"kubectl -n mesh delete pods {selected} (rules stay while it starts)" in remedies
    assert any("-n istio-system get pods -l app=ztunnel" in one for one in remedies)

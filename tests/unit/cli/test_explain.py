# SPDX-License-Identifier: Apache-2.0
"""`sluice explain` as a user reads it."""

from __future__ import annotations

from typing import Any

import pytest

from agent.__main__ import main
from agent.cli import explain
from agent.core.model.pods import Pod
from agent.core.policy.facts import considered
from agent.core.settings import Settings

AMBIENT = {"istio.io/dataplane-mode": "ambient"}
LEAKED = {
    "direction": "outbound", "fate": "leaked", "reason": "raw", "remote": "10.0.0.9:80", "close": "reset",
    "established": True, "closed": 9_990.0, "opened": 9_900.0, "command": "curl", "process": 7, "user": 1000,
}  # fmt: skip
FAILED = {**LEAKED, "direction": "inbound", "fate": "captured", "reason": "", "established": False, "process": 0}

ZTUNNEL: dict[str, Any] = {
    "connections": 1, "acknowledged": True, "listening": [15001], "silent": [], "foreign": [], "error": "",
    "identity": {"namespace": "shop", "name": "web", "service_account": "robot"},
}  # fmt: skip


def facts(pod: Pod) -> list[dict[str, Any]]:
    rows = [
        {"key": one.key, "value": one.value, "origin": one.origin.value, "place": "", "effect": one.effect,
         "decides": False}
        for one in considered(pod, Settings())
    ]  # fmt: skip
    rows[-2]["decides"], rows[3]["place"] = True, "sluice.yaml:3"
    return rows


def captured(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "namespace": "shop", "name": "web", "uid": "u1", "addresses": ["10.0.0.2"], "state": "enabled",
        "reason": "the pod says so", "backend": "nftables", "error": "", "retry": None, "repairs": 1, "outside": 0,
        "leaving": False, "notes": ["lo lacks ::1"],
        "probe": "probe from the node on 10.0.0.2:80: ok", "verified": 9_995.0,
        "decision": "enrolled", "redirect": {"dns": True}, "netns": "/run/netns/web", "source": "cni",
        "in_kernel": "as desired", "differences": [], "inspect_error": "", "foreign": [],
        "non_tcp": {"outbound": {"packets": 3, "bytes": 252}, "inbound": {"packets": 0, "bytes": 0}},
        "recent_repairs": [
            {"time": 9_000.0, "layer": "nftables", "differences": ["a", "b"], "cause": "nft[7]", "seconds": 0.0021},
        ],
        "node": "n1", "decided": "the pod says so",
        "facts": facts(Pod("u1", "shop", "web", annotations=AMBIENT)),
        "options": [
            {"option": "dns", "value": False, "origin": "pod annotation", "key": "dns-capture", "place": ""},
            {"option": "dns_to", "value": [], "origin": "setting", "key": "dns_capture_to", "place": "default"},
            {"option": "ingress_only", "value": False, "origin": "fixed", "key": "", "place": ""},
            {"option": "exclude", "value": {"users": [[0, 0], [5, 9]], "interfaces": []}, "origin": "pod annotation",
             "key": "x", "place": ""},
        ],
        "layers": [{"layer": "routing", "in_sync": True, "differences": [], "script": ""},
                   {"layer": "nftables", "in_sync": True, "differences": [], "script": ""}],
        "ztunnel": ZTUNNEL,
        "programs": ["BPF program pass (number 7) is attached to eth0 (XDP)"],
        "annotation": {"key": "ambient.istio.io/redirection", "value": "enabled"},
        "exemption": {"mechanism": "nftables", "ok": True, "error": "", "addresses": ["10.0.0.2"]},
        "connections": {"collector": "ebpf", "error": "", "live": 1, "ended": 2, "fates": [
            {"direction": "outbound", "fate": "leaked", "reason": "raw", "connections": 2}],
            "behind": {
                "considered": 4, "failed": 2,
                "destinations": [
                    {"remote": "10.1.0.1:80", "name": "bank/db", "failed": 2, "seconds": 0.04, "cause": "refused"},
                ],
            }, "unanswered": {"connections": 2, "seconds": 3.0}, "wrong": [LEAKED, FAILED]},
        "advice": "",
        "mesh": {"error": "", "certificate": {"identity": "spiffe://td/ns/shop/sa/robot", "state": "Available",
                                              "until": "2026-03-04T05:06:07Z"},
                 "carried": [{"direction": "inbound", "wire": "hbone", "remote_identity": "spiffe://td/ns/a/sa/b",
                              "connections": 4},
                             {"direction": "outbound", "wire": "unknown", "remote_identity": "", "connections": 1}]},
    }  # fmt: skip
    return {**told, **changes}


TEXT = """\
Pod:       shop/web  (UID u1, node n1)
Captured:  yes by nftables: the pod says so
Action:    none
Note:      lo lacks ::1

Decision
      FACT                     VALUE                   FROM                     EFFECT
      host network             no                      pod                      -
      sidecar.istio.io/status  -                       pod annotation           -
      app                      -                       pod label                -
      exclude_namespaces       kube-system             setting (sluice.yaml:3)  -
      own_namespace            -                       setting                  -
      exempt_pods              istio-system/ztunnel-*  setting                  -
      runtime class            -                       pod                      -
      unsupported_runtimes     gvisor                  setting                  -
      ended                    no                      pod                      -
      istio.io/dataplane-mode  -                       pod label                -
  ->  istio.io/dataplane-mode  ambient                 pod annotation           enrols
      istio.io/dataplane-mode  -                       namespace label          -

Desired
  OPTION        VALUE        FROM
  dns           no           pod annotation dns-capture
  dns_to        any          setting dns_capture_to (default)
  ingress_only  no           default
  exclude       users=0,5-9  pod annotation x

Actual
  In the kernel:  as desired
    routing:      as desired
    nftables:     as desired
  In its path:    BPF program pass (number 7) is attached to eth0 (XDP)
  ztunnel:        has the pod as shop/web, service account robot
  Listeners:      15001
  Node's probes:  exempt by nftables for 10.0.0.2
  Probe:          probe from the node on 10.0.0.2:80: ok
  Annotation:     ambient.istio.io/redirection=enabled

Connections
  1 live, 2 recently ended (collector: ebpf)
       2 outbound leaked (raw)
  of the last 4 captured outbound ones, ztunnel took and cut off 2:
       2 to 10.1.0.1:80 (bank/db) after 40.0ms: refused
  2 live: sent something, and no answer yet, for up to 3.00s
  DIR  FATE          CLOSE                     PEER         PROCESS                  AGO
  out  leaked (raw)  reset                     10.0.0.9:80  curl (pid 7, user 1000)  10s
  in   captured      reset, never established  10.0.0.9:80  -                        10s
  non-TCP, outbound: 3 packets, 252 bytes, neither TCP nor captured DNS

Mesh
  Identity:  spiffe://td/ns/shop/sa/robot, certificate available until 2026-03-04T05:06:07Z
  DIR  WIRE     REMOTE IDENTITY        CONNECTIONS
  in   hbone    spiffe://td/ns/a/sa/b  4
  out  unknown  -                      1

Repaired
  AGO  LAYER     TOOK   CHANGED BY  WHAT DIFFERED
  16m  nftables  2.1ms  nft[7]      a; b

State:       enabled, verified 5s ago
Addresses:   10.0.0.2
Namespace:   /run/netns/web
Known from:  cni"""


def test_all_of_it() -> None:
    assert explain.explained(captured(), 10_000.0) == TEXT


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"decision": "excluded", "backend": ""}, "no, excluded: the pod says so"),
        ({"decision": "excluded", "differences": ["x"], "redirect": None}, "no, excluded, but rules of Sluice are"),
        ({"state": "waiting"}, "not yet: not examined yet; will be enrolled: the pod says so"),
        ({"state": "waiting", "error": "no ztunnel"}, "not yet: no ztunnel; will be enrolled: the pod says so"),
        (
            {"state": "excluded", "decision": "excluded", "leaving": True},
            "no, excluded, but ztunnel keeps its older connections for a while: the pod says so",
        ),
        ({"state": "pending"}, "not yet: its rules are in place, but no ztunnel has it, so its traffic is refused"),
        ({"state": "stalled", "error": "since 12:00"}, "yes by nftables, but its connections hang: since 12:00"),
        ({"state": "failed", "error": "no memory"}, "NO, though it should be: no memory"),
        ({"inspect_error": "no memory"}, "unknown by nftables: no memory"),
        ({"in_kernel": "drifted", "layers": [{"layer": "l", "in_sync": False, "differences": ["a", "b"]}]},
         "NOT as it should be by nftables: 2 differences in the kernel; enrolled: the pod says so"),
        ({"ztunnel": ZTUNNEL | {"listening": [], "silent": [15001]}},
         "NO by nftables: rules are right, but ztunnel does not listen in it"),
        ({"foreign": ["a chain"]}, "NOT all by nftables: Sluice's rules are right, but foreign rules come before them"),
    ],
)  # fmt: skip
def test_the_second_line_names_the_cause(changes: dict[str, Any], line: str) -> None:
    lines = explain.explained(captured(**changes), 10_000.0).splitlines()
    assert lines[1].startswith(f"Captured:  {line}")
    assert lines[2].startswith("Action: ")


def test_an_error_with_its_next_try_comes_early() -> None:
    text = explain.explained(captured(state="failed", error="no memory", retry=1.25, advice="do this"), 10_000.0)
    assert text.splitlines()[2:4] == ["Action:    do this", "Error:     no memory; next try in 1.2 s"]


def test_what_is_in_the_way_is_a_note_once() -> None:
    text = explain.explained(captured(foreign=["a chain"], notes=["a chain", "lo lacks ::1"]), 10_000.0)
    notes = [line.split(None, 1)[1] for line in text.splitlines() if line.startswith("Note:")]
    assert notes == ["a chain", "lo lacks ::1"]


def test_what_is_missing_is_said() -> None:
    off = {"collector": "off", "error": "", "live": 0, "ended": 0, "fates": [], "wrong": []}
    silent = {
        "connections": 0,
        "acknowledged": False,
        "listening": [15001],
        "silent": [15006],
        "error": "",
        "foreign": ["nginx[7] listens on 0.0.0.0:15006"],
    }
    host = {"mechanism": "off", "ok": False, "error": "", "addresses": []}
    text = explain.explained(captured(connections=off, ztunnel=silent, exemption=host, annotation=None), 10_000.0)
    for words in (
        "not accounted for: the setting accounting is off", "none is connected to the agent",
        "15001; MISSING: 15006; nginx[7] listens on 0.0.0.0:15006",
        "captured like any other connection (setting host_probes)",
    ):  # fmt: skip
        assert words in text
    assert "Annotation" not in text


@pytest.mark.parametrize(
    ("mesh", "lines"),
    [
        ({"error": "no ztunnel", "certificate": {}, "carried": []}, ["  unknown: no ztunnel"]),
        ({"error": "", "certificate": {}, "carried": []}, ["  Identity:  none"]),
    ],
)
def test_a_mesh_that_is_not_known(mesh: dict[str, Any], lines: list[str]) -> None:
    text = explain.explained(captured(mesh=mesh), 10_000.0)
    assert text.partition("Mesh\n")[2].partition("\n\n")[0].splitlines() == lines
    assert "Mesh" not in explain.explained(captured(mesh=None), 10_000.0)


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (["web"], "web"), (["shop/web"], "shop/web"), (["-n", "shop", "web"], "shop/web"),
        (["web", "--namespace", "shop"], "shop/web"), (["-n", "shop", "shop/web"], "shop/web"),
    ],
)  # fmt: skip
def test_which_pod_is_asked_for(
    argv: list[str], asked: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = list[str]()

    def ask(run_dir: str, path: str, **query: str) -> Any:
        found.append(query["pod"])
        return captured()

    monkeypatch.setattr(explain, "ask", ask)
    assert main(["explain", *argv]) == 0
    assert found == [asked] and capsys.readouterr().out.startswith("Pod:       shop/web")


def test_two_namespaces_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "-n", "bank", "shop/web"]) == 2
    assert capsys.readouterr().err == "sluice: shop/web: not of namespace bank; give the namespace once\n"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (200_000, "2d")]
)
def test_ago(seconds: int, said: str) -> None:
    assert explain.ago(1_000.0, 1_000.0 + seconds) == said
    assert explain.ago(0.0, 5.0) == ""


def test_dns_is_one_section_where_the_pod_asked_anything() -> None:
    told = {
        "queries": 9, "rcodes": {"NXDOMAIN": 5, "no answer": 4}, "median_seconds": 0.002, "silent": {"10.0.0.53": 4},
        "search": 5, "around": 1, "lost": 7,
    }  # fmt: skip
    wanted = (
        "DNS\n"
        "  Last 9: 5 NXDOMAIN, 4 no answer; median latency 2.0ms\n"
        "  No answer from: 10.0.0.53 (4)\n"
        "  By search domains: 5 for names that do not exist; end names with a dot, or lower ndots\n"
        "  Not captured: 1\n"
        "  Lost by the account: 7 packets or queries\n"
    )
    assert wanted in explain.explained(captured(dns=told), 10_000.0)
    for nothing in (None, {**told, "queries": 0}):
        assert "\nDNS\n" not in explain.explained(captured(dns=nothing), 10_000.0)

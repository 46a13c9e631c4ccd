# SPDX-License-Identifier: Apache-2.0
"""Every value of the chart reaches the process or the object that it is for; what is misspelt is refused."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import chart
from support.chart import agent, kinds, metadata, mounted, ztunnel

from agent.core.setting_types import Choice
from agent.core.settings import DECLARED, Settings

SCHEMA = chart.CHART / "values.schema.json"
PLATFORMS = yaml.safe_load((chart.CHART / "files/platforms.yaml").read_text())


def test_the_schema_has_every_setting_with_the_agents_own_ranges() -> None:
    """SLUICE_GOLDEN=write puts them in."""
    schema = json.loads(SCHEMA.read_text())
    if os.environ.get("SLUICE_GOLDEN") == "write":
        schema["properties"]["settings"] = chart.settings_schema()
        SCHEMA.write_text(json.dumps(schema, indent=2) + "\n")
    assert schema["properties"]["settings"] == chart.settings_schema()


def test_every_setting_arrives_as_the_agent_reads_it(tmp_path: Path) -> None:
    """All at once, each with a value that is neither its default nor another's; large numbers among them."""
    given = chart.unusual()
    apart = {"kube_peers": given.pop("kube_peers")}  # not together with peers_file
    arrived = set()
    for values in (given, apart):
        got = chart.settings(chart.render({"settings": values}), tmp_path)
        wanted = chart.build({key: (value, "test") for key, value in values.items()})
        for name in values:
            assert getattr(wanted, name) != getattr(Settings(), name), f"{name}: no unusual value in the test"
            assert getattr(got, name) == getattr(wanted, name), name
            arrived.add(name)
    assert arrived == {field.name for field in fields(Settings)} - set(chart.NOT_IN_VALUES)


def test_what_is_not_set_has_the_agents_default(tmp_path: Path) -> None:
    got = chart.settings(chart.render({}), tmp_path)
    differ = {one.name for one in fields(Settings) if getattr(got, one.name) != getattr(Settings(), one.name)}
    assert differ == {"host_root", "own_namespace"}
    assert (got.host_root, got.own_namespace) == ("/host", chart.NAMESPACE)


def test_the_embedded_ztunnel_is_not_expected_to_listen_for_hbone(tmp_path: Path) -> None:
    embedded = {"ztunnel": {"embedded": True}}
    assert chart.settings(chart.render(embedded), tmp_path).ztunnel_ports == ("15001", "15006")
    own = embedded | {"settings": {"ztunnel_ports": ["15001"]}}
    assert chart.settings(chart.render(own), tmp_path).ztunnel_ports == ("15001",)


def test_uninstalling_looks_where_the_agent_was() -> None:
    values = {"uninstall": True, "settings": {"run_dir": "/run/r", "bpf_dir": "/sys/fs/bpf/b"}}
    first, second = chart.pod(chart.render(values))["initContainers"]
    assert first["args"] == ["uninstall", "--config", "/etc/sluice/sluice.yaml"]
    assert ztunnel(chart.render(values | {"ztunnel": {"embedded": True}})), "it serves until no pod is captured"
    wanted = ["--annotations", "--config=/etc/sluice/sluice.yaml", "--run-dir=/run/r", "--bpf-dir=/sys/fs/bpf/b"]
    assert second["args"] == ["uncapture", "--all", *wanted]


def test_every_choice_of_a_setting_is_accepted(tmp_path: Path) -> None:
    kinds = {key: one.kind for key, one in DECLARED.items()}
    choices = {key: (*kind.words, *kind.former) for key, kind in kinds.items() if isinstance(kind, Choice)}
    for number in range(max(map(len, choices.values()))):
        given = {key: words[min(number, len(words) - 1)] for key, words in choices.items()}
        got = chart.settings(chart.render({"settings": given}), tmp_path)
        assert {key: getattr(got, key) for key in given} == given


@pytest.mark.parametrize(
    "values",
    [
        {"settings": {"backand": "nftables"}},
        {"settings": {"backend": "pf"}},
        {"settings": {"metrics_label_sets": 0}},
        {"settings": {"node_name": "one"}},
        {"platform": "kubeadm2"},
        {"images": {}},
        {"image": {"tags": "x"}},
        {"writable": ["relative"]},
    ],
)
def test_what_is_misspelt_or_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(chart.HelmError, match=next(iter(values))):
        chart.render(values)


def test_settings_move_the_mounts_along() -> None:
    moved = {
        "run_dir": "/run/r", "zds_socket": "/run/z/s.sock", "bpf_dir": "/sys/fs/bpf2/x",
        "connection_log": "/var/log/l/c", "cni_conf_dir": "/a/b/net.d", "cni_bin_dir": "/c/d/bin",
        "host_root": "/h", "metrics_address": "[::]:1234",
    }  # fmt: skip
    objects = chart.render({"settings": moved, "ztunnel": {"embedded": True}})
    for path, source in {
        "/run/r": "/run/r", "/run/z": "/run/z", "/sys/fs/bpf2": "/sys/fs/bpf2", "/var/log/l": "/var/log/l",
        "/h": "/", "/h/a/b": "/a/b", "/h/c/d": "/c/d", "/h/etc/cni": "/etc/cni",
    }.items():  # fmt: skip
        assert mounted(objects, path, source), path
    assert agent(objects)["ports"][0]["containerPort"] == 1234
    assert "--zds-socket=/run/z/s.sock" in ztunnel(objects)["args"]
    assert "--bpf-dir=/sys/fs/bpf2/x" in ztunnel(objects)["args"]
    assert {one["mountPath"] for one in ztunnel(objects)["volumeMounts"]} == {"/run/z", "/sys/fs/bpf2", "/run/ready"}


def test_probes_ask_where_the_agent_listens() -> None:
    places = ("0.0.0.0:15014", None, 15014), ("127.0.0.1:9", "127.0.0.1", 9), ("[fd00::1]:99", "fd00::1", 99)
    for address, host, port in places:
        one = agent(chart.render({"settings": {"metrics_address": address}}))
        for probe, path in (("readinessProbe", "/readyz"), ("livenessProbe", "/healthz"), ("startupProbe", "/healthz")):
            assert one[probe]["httpGet"].get("host") == host and one[probe]["httpGet"]["path"] == path
        assert one["ports"] == [{"name": "metrics", "containerPort": port, "hostPort": port, "protocol": "TCP"}]
    silent = agent(chart.render({"settings": {"metrics_address": ""}}))
    assert not {"ports", "readinessProbe", "livenessProbe", "startupProbe"} & set(silent)


def test_a_change_of_settings_restarts_the_agents_and_one_of_files_does_not() -> None:
    def checksum(values: dict[str, Any]) -> str:
        return str(metadata(chart.render(values))["annotations"]["checksum/config"])

    assert checksum({"settings": {"ipv6": False}}) != checksum({}) == checksum({"files": {"a": "b"}})


def test_the_role_holds_what_the_settings_need_and_no_more() -> None:
    def allowed(values: dict[str, Any]) -> dict[str, list[str]]:
        held = chart.only(chart.render(values), "ClusterRole")["rules"]
        return {resource: rule["verbs"] for rule in held for resource in rule["resources"]}

    seen = ["get", "list", "watch"]
    least = {"pods": seen, "namespaces": seen, "pods/status": ["patch"], "events": ["create"]}
    assert allowed({}) == least
    assert allowed({"settings": {"kube_peers": True}}) == least | {"services": ["list", "watch"]}
    assert allowed({"settings": {"startup_taint": "a/b"}}) == least | {"nodes": ["get", "patch"]}
    reviews = {"tokenreviews": ["create"], "subjectaccessreviews": ["create"]}
    assert allowed({"rbac": {"debug": True}}) == least | reviews
    assert "ClusterRole" not in kinds(chart.render({"settings": {"kube_server": "none"}}))


def test_a_rollout_waits_until_the_embedded_ztunnel_has_its_pods() -> None:
    objects = chart.render({"ztunnel": {"embedded": True}})
    made, spec = ztunnel(objects), chart.pod(objects, "sluice-ztunnel")
    path = next(word for word in made["args"] if word.startswith("--ready-file=")).partition("=")[2]
    assert path in made["startupProbe"]["exec"]["command"][-1]
    mount = next(one for one in made["volumeMounts"] if path.startswith(one["mountPath"] + "/"))
    volume = next(one for one in spec["volumes"] if one["name"] == mount["name"])
    assert "emptyDir" in volume, "no other pod's"


def test_pods_are_not_privileged_and_need_no_network_of_pods() -> None:
    agents = {"SYS_ADMIN", "NET_ADMIN", "NET_RAW", "SYS_PTRACE", "DAC_OVERRIDE"}
    for name, least in (("sluice", agents), ("sluice-ztunnel", {"SYS_ADMIN", "NET_ADMIN"})):
        spec = chart.pod(chart.render({"ztunnel": {"embedded": True}}), name)
        context = spec["containers"][0]["securityContext"]
        assert spec["hostNetwork"] and spec["dnsPolicy"] == "ClusterFirstWithHostNet"
        assert context["capabilities"] == {"drop": ["ALL"], "add": context["capabilities"]["add"]}
        assert set(context["capabilities"]["add"]) == least
        assert context["readOnlyRootFilesystem"] and not context["privileged"]
    resting = chart.pod(chart.render({"uninstall": True}))["containers"][0]
    assert resting["securityContext"]["capabilities"]["add"] == [] and "volumeMounts" not in resting


def test_the_hosts_files_are_read_only_but_for_cnis_parents() -> None:
    """The parents, so that a directory which is removed and made again is seen (P26), and a link that is changed."""
    for platform, own in PLATFORMS.items():
        mounts = {one["mountPath"]: one for one in agent(chart.render({"platform": platform}))["volumeMounts"]}
        assert mounts["/host"]["readOnly"] and mounts["/host"]["mountPropagation"] == "HostToContainer"
        writable = {path for path, one in mounts.items() if path.startswith("/host/") and not one.get("readOnly")}
        assert writable == {f"/host{path}" for path in own.get("writable", ["/etc/cni", "/opt/cni"])}
        assert not {"/host/etc/cni/net.d", "/host/opt/cni/bin"} & set(mounts)


def test_what_is_set_wins_over_the_platform() -> None:
    objects = chart.render({"platform": "openshift", "scc": False, "seLinuxOptions": {}, "writable": ["/x/y"]})
    assert "SecurityContextConstraints" not in kinds(objects)
    assert "seLinuxOptions" not in agent(objects)["securityContext"]
    assert mounted(objects, "/host/x/y", "/x/y") and not mounted(objects, "/host/var/lib/cni", "/var/lib/cni")
    assert "ResourceQuota" not in kinds(chart.render({"platform": "gke", "resourceQuota": {"enabled": False}}))
    assert "ResourceQuota" in kinds(chart.render({"platform": "gke"}))


def test_alerts_are_the_very_file() -> None:
    objects = chart.render({"prometheusRule": {"enabled": True}})
    alerts = yaml.safe_load((chart.ROOT / "deploy/alerts/sluice.rules.yaml").read_text())
    assert chart.only(objects, "PrometheusRule")["spec"] == alerts
    assert (chart.CHART / "files/sluice.rules.yaml").is_symlink()


def test_chart_and_agent_have_one_version() -> None:
    from agent import __version__

    made = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert made["appVersion"] == made["version"] == __version__


def test_the_embedded_ztunnel_has_an_account_without_rights_and_no_pin_to_remove() -> None:
    objects = chart.render({"ztunnel": {"embedded": True}, "scc": True})
    pod = chart.pod(objects, "sluice-ztunnel")
    account = pod["serviceAccountName"]
    assert account != chart.pod(objects)["serviceAccountName"] and not pod["automountServiceAccountToken"]
    assert account not in str([one for one in objects if "Role" in one["kind"]])
    assert (
        f"system:serviceaccount:sluice-system:{account}" in chart.only(objects, "SecurityContextConstraints")["users"]
    )
    kinds_of = {kind for one in pod["volumes"] for kind in one if kind != "name"}
    assert kinds_of <= set(chart.only(objects, "SecurityContextConstraints")["volumes"])
    (bpf,) = (one for one in pod["containers"][0]["volumeMounts"] if one["name"] == "bpf")
    assert bpf["readOnly"]


def test_the_admission_policy_is_of_the_agents_account_alone_and_needs_tokens_that_name_the_node() -> None:
    values = {"admissionPolicy": {"enabled": True}, "serviceAccount": {"name": "odd"}}
    objects = chart.render(values, "--kube-version", "v1.30.0")
    policy = chart.only(objects, "ValidatingAdmissionPolicy")
    for one in (policy, chart.only(objects, "ValidatingAdmissionPolicyBinding")):
        chart.validate(one, "v1.30.0")
    (match,) = policy["spec"]["matchConditions"]
    assert '"system:serviceaccount:sluice-system:odd"' in match["expression"]
    assert policy["spec"]["failurePolicy"] == "Fail"
    own = next(one["expression"] for one in policy["spec"]["variables"] if one["name"] == "own")
    assert f'== "{chart.NAMESPACE}"' in own and "authentication.kubernetes.io/pod-name" in own
    status = [one["expression"] for one in policy["spec"]["validations"] if "object.status" in one["expression"]]
    assert len(status) == 1 and "(variables.own || object.status == oldObject.status)" in status[0]
    with pytest.raises(chart.HelmError, match="needs Kubernetes"):
        chart.render(values, "--kube-version", "v1.29.0")

# SPDX-License-Identifier: Apache-2.0
"""Every value of the chart reaches the object that it is for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from support import chart
from support.chart import Objects, agent, kinds, metadata, mounted, rules, ztunnel

SCHEMA = chart.CHART / "values.schema.json"
RESOURCES = {"limits": {"memory": "123Mi"}}
TERM = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [
    {"key": "odd", "operator": "Exists"}]}]}}}  # fmt: skip
# What values.schema.json names: a value for it, and how it is seen that it got where it is for.
CASES: Mapping[str, tuple[Any, Callable[[Objects], bool]]] = {
    "global": ({"odd": 1}, lambda o: True),  # Helm's own: subcharts of an umbrella chart are given it
    "platform": ("minikube", lambda o: mounted(o, "/var/run/docker/netns", "/var/run/docker/netns")),
    "files": (
        {"odd.yaml": "pods: []\n"},
        lambda o: chart.only(o, "ConfigMap", "sluice-files")["data"] == {"odd.yaml": "pods: []\n"},
    ),
    "image.repository": ("odd.example/x", lambda o: agent(o)["image"].startswith("odd.example/x:")),
    "image.tag": ("odd", lambda o: agent(o)["image"].endswith(":odd")),
    "image.digest": ("sha256:" + "a" * 64, lambda o: agent(o)["image"].endswith("@sha256:" + "a" * 64)),
    "image.pullPolicy": ("Always", lambda o: agent(o)["imagePullPolicy"] == "Always"),
    "imagePullSecrets": ([{"name": "odd"}], lambda o: chart.pod(o)["imagePullSecrets"] == [{"name": "odd"}]),
    "uninstall": (
        True,
        lambda o: [one["args"][0] for one in chart.pod(o)["initContainers"]] == ["uninstall", "uncapture"],
    ),
    "ztunnel.embedded": (True, lambda o: ztunnel(o)["args"][0] == "ztunnel"),
    "ztunnel.records": ("-", lambda o: "--records=-" in ztunnel(o)["args"]),
    "ztunnel.workers": ("auto", lambda o: "--workers=auto" in ztunnel(o)["args"]),
    "ztunnel.drainSeconds": (
        77,
        lambda o: (
            "--drain-seconds=77" in ztunnel(o)["args"]
            and chart.pod(o, "sluice-ztunnel")["terminationGracePeriodSeconds"] > 77
        ),
    ),
    "ztunnel.resources": (RESOURCES, lambda o: ztunnel(o)["resources"]["limits"] == RESOURCES["limits"]),
    "writable": (
        ["/odd/cni"],
        lambda o: mounted(o, "/host/odd/cni", "/odd/cni") and not mounted(o, "/host/etc/cni", "/etc/cni"),
    ),
    "netnsDirs": (["/odd/netns"], lambda o: mounted(o, "/odd/netns", "/odd/netns")),
    "cgroupRoot": ("/odd/cgroup", lambda o: mounted(o, "/cgroup", "/odd/cgroup")),
    "resources": (RESOURCES, lambda o: agent(o)["resources"]["limits"] == RESOURCES["limits"]),
    "priorityClassName": ("odd", lambda o: chart.pod(o)["priorityClassName"] == "odd"),
    "nodeSelector": ({"odd": "yes"}, lambda o: chart.pod(o)["nodeSelector"]["odd"] == "yes"),
    "affinity": (TERM, lambda o: chart.pod(o)["affinity"] == TERM),
    "tolerations": (
        [{"key": "odd", "operator": "Exists"}],
        lambda o: chart.pod(o)["tolerations"] == [{"key": "odd", "operator": "Exists"}],
    ),
    "updateStrategy": (
        {"type": "OnDelete"},
        lambda o: chart.only(o, "DaemonSet")["spec"]["updateStrategy"]["type"] == "OnDelete",
    ),
    "terminationGracePeriodSeconds": (99, lambda o: chart.pod(o)["terminationGracePeriodSeconds"] == 99),
    "daemonSetAnnotations": (
        {"odd": "yes"},
        lambda o: chart.only(o, "DaemonSet")["metadata"]["annotations"] == {"odd": "yes"},
    ),
    "podAnnotations": ({"odd": "yes"}, lambda o: metadata(o)["annotations"]["odd"] == "yes"),
    "podLabels": ({"odd": "yes"}, lambda o: metadata(o)["labels"]["odd"] == "yes"),
    "seccompProfile": (
        {"type": "Unconfined"},
        lambda o: agent(o)["securityContext"]["seccompProfile"] == {"type": "Unconfined"},
    ),
    "seLinuxOptions": ({"type": "odd_t"}, lambda o: agent(o)["securityContext"]["seLinuxOptions"] == {"type": "odd_t"}),
    "appArmor": (
        "annotation",
        lambda o: (
            metadata(o)["annotations"]["container.apparmor.security.beta.kubernetes.io/agent"] == "unconfined"
            and "appArmorProfile" not in agent(o)["securityContext"]
        ),
    ),
    "scc": (
        True,
        lambda o: (
            f"system:serviceaccount:sluice-system:{chart.pod(o)['serviceAccountName']}"
            in chart.only(o, "SecurityContextConstraints")["users"]
        ),
    ),
    "serviceAccount.create": (False, lambda o: "ServiceAccount" not in kinds(o)),
    "serviceAccount.name": (
        "odd",
        lambda o: (
            chart.pod(o)["serviceAccountName"] == "odd"
            and bool(chart.only(o, "ServiceAccount", "odd"))
            and chart.only(o, "ClusterRoleBinding")["subjects"][0]["name"] == "odd"
        ),
    ),
    "serviceAccount.annotations": (
        {"odd": "yes"},
        lambda o: chart.only(o, "ServiceAccount")["metadata"]["annotations"] == {"odd": "yes"},
    ),
    "rbac.create": (False, lambda o: not kinds(o) & {"ClusterRole", "ClusterRoleBinding"}),
    "rbac.debug": (True, lambda o: "tokenreviews" in rules(o) and "subjectaccessreviews" in rules(o)),
    "admissionPolicy.enabled": (True, lambda o: "ValidatingAdmissionPolicyBinding" in kinds(o)),
    "ztunnel.serviceAccount": (
        "odd-ztunnel",
        lambda o: (
            chart.pod(o, "sluice-ztunnel")["serviceAccountName"] == "odd-ztunnel"
            and bool(chart.only(o, "ServiceAccount", "odd-ztunnel"))
        ),
    ),
    "networkPolicy.enabled": (
        True,
        lambda o: chart.only(o, "NetworkPolicy")["spec"]["ingress"][0]["ports"][0]["port"] == 15014,
    ),
    "networkPolicy.from": (
        [{"podSelector": {}}],
        lambda o: chart.only(o, "NetworkPolicy")["spec"]["ingress"][0]["from"] == [{"podSelector": {}}],
    ),
    "podMonitor.enabled": (True, lambda o: bool(chart.only(o, "PodMonitor"))),
    "podMonitor.interval": (
        "7s",
        lambda o: chart.only(o, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["interval"] == "7s",
    ),
    "podMonitor.labels": ({"odd": "yes"}, lambda o: chart.only(o, "PodMonitor")["metadata"]["labels"]["odd"] == "yes"),
    "serviceMonitor.enabled": (
        True,
        lambda o: (
            bool(chart.only(o, "ServiceMonitor"))
            and chart.only(o, "Service")["spec"]["ports"]
            == [{"name": "metrics", "port": 15014, "targetPort": "metrics"}]
        ),
    ),
    "serviceMonitor.interval": (
        "8s",
        lambda o: chart.only(o, "ServiceMonitor")["spec"]["endpoints"][0]["interval"] == "8s",
    ),
    "serviceMonitor.labels": (
        {"odd": "yes"},
        lambda o: chart.only(o, "ServiceMonitor")["metadata"]["labels"]["odd"] == "yes",
    ),
    "prometheusRule.enabled": (True, lambda o: bool(chart.only(o, "PrometheusRule"))),
    "prometheusRule.labels": (
        {"odd": "yes"},
        lambda o: chart.only(o, "PrometheusRule")["metadata"]["labels"]["odd"] == "yes",
    ),
    "prometheusRule.runbooks": (
        "https://odd.example/runbooks",
        lambda o: (
            {
                rule["annotations"]["runbook_url"].rpartition("#")[0]
                for rule in chart.only(o, "PrometheusRule")["spec"]["groups"][0]["rules"]
            }
            == {"https://odd.example/runbooks"}
        ),
    ),
    "dashboard.enabled": (
        True,
        lambda o: (
            chart.only(o, "ConfigMap", "sluice-dashboard")["data"]["sluice.json"]
            == (chart.ROOT / "deploy/dashboards/sluice.json").read_text()
        ),
    ),
    "dashboard.labels": (
        {"odd": "yes"},
        lambda o: chart.only(o, "ConfigMap", "sluice-dashboard")["metadata"]["labels"]["odd"] == "yes",
    ),
    "dashboard.annotations": (
        {"odd": "yes"},
        lambda o: chart.only(o, "ConfigMap", "sluice-dashboard")["metadata"]["annotations"] == {"odd": "yes"},
    ),
    "resourceQuota.enabled": (True, lambda o: bool(chart.only(o, "ResourceQuota"))),
    "resourceQuota.pods": ("77", lambda o: chart.only(o, "ResourceQuota")["spec"]["hard"] == {"pods": "77"}),
}
# These would hide what another is for: each is rendered alone, the others together.
ALONE = {"platform", "image.digest", "uninstall", "serviceAccount.create", "serviceAccount.name", "rbac.create"}
SWITCHES: Mapping[str, Any] = {
    "ztunnel": {"embedded": True}, "networkPolicy": {"enabled": True}, "podMonitor": {"enabled": True},
    "prometheusRule": {"enabled": True}, "resourceQuota": {"enabled": True}, "serviceMonitor": {"enabled": True},
    "dashboard": {"enabled": True},
}  # fmt: skip


def put(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """At "a.b"."""
    first, _, rest = path.partition(".")
    values[first] = values.get(first, {}) | {rest: value} if rest else value
    return values


def test_every_value_has_a_case() -> None:
    found = {path for path in chart.leaves(json.loads(SCHEMA.read_text())) if not path.startswith("settings.")}
    assert found == set(CASES)


def test_every_value_with_a_default_is_in_the_schema_and_the_other_way_round() -> None:
    schema = json.loads(SCHEMA.read_text())
    defaults = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    assert set(defaults) == set(schema["properties"]) - {"global"}
    for key, part in schema["properties"].items():
        if "properties" in part and key != "settings":
            assert set(defaults[key]) == set(part["properties"])


def test_each_value_reaches_what_it_is_for() -> None:
    together: dict[str, Any] = {}
    for path in set(CASES) - ALONE:
        put(together, path, CASES[path][0])
    objects, plain, switched = chart.render(together), chart.render({}), chart.render(dict(SWITCHES))
    for path, (value, seen) in CASES.items():
        made = chart.render(put({}, path, value)) if path in ALONE else objects
        assert seen(made), f"{path}: {value!r} is not to be found in what is rendered"
        without = plain if path.split(".")[-1] in ("enabled", "embedded") or path in ALONE else switched
        assert path == "global" or not holds(seen, without), f"{path}: the case holds without the value too"


def holds(seen: Callable[[Objects], bool], objects: Objects) -> bool:
    try:
        return seen(objects)
    except (AssertionError, KeyError):
        return False

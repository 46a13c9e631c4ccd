# SPDX-License-Identifier: Apache-2.0
"""What the chart renders is valid by Kubernetes' own schemas; the plain manifests are what it renders."""

from __future__ import annotations

import os
from typing import Any

import pytest
import yaml
from support import chart

EVERYTHING: dict[str, Any] = {
    "ztunnel": {"embedded": True}, "networkPolicy": {"enabled": True, "from": [{"namespaceSelector": {}}]},
    "resourceQuota": {"enabled": True}, "rbac": {"debug": True}, "imagePullSecrets": [{"name": "x"}],
    "settings": {"kube_peers": True, "startup_taint": "sluice.io/not-ready", "connection_log": "/var/log/sluice/c.log"},
    "files": {"static.yaml": "pods: []\n"}, "podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True},
    "serviceMonitor": {"enabled": True}, "dashboard": {"enabled": True},
    "podAnnotations": {"a": "b"}, "daemonSetAnnotations": {"a": "b"}, "serviceAccount": {"annotations": {"a": "b"}},
}  # fmt: skip
FOREIGN = {"PodMonitor", "ServiceMonitor", "PrometheusRule", "SecurityContextConstraints"}  # not Kubernetes' own
# Files of deploy/manifests: each is the namespace and what the chart renders with these values.
PLAIN: dict[str, dict[str, Any]] = {
    "sluice.yaml": {},
    "sluice-with-ztunnel.yaml": {"ztunnel": {"embedded": True}},
    "uninstall.yaml": {"uninstall": True},
}
HEAD = """# Rendered from deploy/chart/sluice by SLUICE_GOLDEN=write .venv/bin/pytest tests/deploy; do not edit.
apiVersion: v1
kind: Namespace
metadata:
  name: sluice-system
  labels:
    # The agent has the node's network, process ids and files, and named capabilities.
    pod-security.kubernetes.io/enforce: privileged
"""


@pytest.mark.parametrize("version", ["oldest", "1.29.0", "1.30.0", "newest"])
@pytest.mark.parametrize("values", [{}, EVERYTHING, {"uninstall": True}], ids=["default", "everything", "uninstall"])
def test_valid_by_the_schemas_of_the_api(values: dict[str, Any], version: str) -> None:
    """Strict: a key that the API does not know is refused. AppArmor is an annotation before 1.30, a field since."""
    known = chart.versions()
    number = {"oldest": known[0], "newest": known[-1]}.get(version, f"v{version}")
    objects = chart.render(values, "--kube-version", number)
    for one in objects:
        if one["kind"] not in FOREIGN:
            chart.validate(one, number)
    field = "appArmorProfile" in str(chart.only(objects, "DaemonSet"))
    assert field == (int(number.split(".")[1]) >= 30)


def test_a_wrong_key_would_be_seen() -> None:
    one = chart.only(chart.render({}), "DaemonSet")
    one["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(Exception, match="hostPid"):
        chart.validate(one, chart.versions()[-1])


def test_every_platform_is_valid() -> None:
    for platform in yaml.safe_load((chart.CHART / "files/platforms.yaml").read_text()):
        for one in chart.render({"platform": platform}):
            if one["kind"] not in FOREIGN:
                chart.validate(one, chart.versions()[-1])


def test_names_of_volumes_and_mounts_agree() -> None:
    for values in ({}, EVERYTHING, {"uninstall": True}, {"platform": "minikube"}):
        objects = chart.render(values)
        for name in ("sluice", "sluice-ztunnel") if values is EVERYTHING else ("sluice",):
            spec = chart.pod(objects, name)
            volumes = [one["name"] for one in spec["volumes"]]
            assert len(volumes) == len(set(volumes))
            for container in (*spec["containers"], *spec.get("initContainers", ())):
                mounts = [one["mountPath"] for one in container.get("volumeMounts", ())]
                assert len(mounts) == len(set(mounts))
                assert {one["name"] for one in container.get("volumeMounts", ())} <= set(volumes)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_plain_manifests_are_what_the_chart_renders(name: str) -> None:
    made = HEAD + chart.template(PLAIN[name])
    path = chart.MANIFESTS / name
    if os.environ.get("SLUICE_GOLDEN") == "write":
        path.write_text(made)
    assert path.read_text() == made

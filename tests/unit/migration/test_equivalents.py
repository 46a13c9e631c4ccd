# SPDX-License-Identifier: Apache-2.0
"""What istio-cni's settings are here, from every form in which a person has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from agent.core.settings import DECLARED, Settings, build
from agent.install.planning import View
from agent.migration.assessment import translated_of
from agent.migration.equivalents import TABLE, differences, translate
from agent.migration.migration_facts import MigrationFacts
from agent.migration.values import of_entry, read

ALL = {
    "AMBIENT_DNS_CAPTURE": "false", "AMBIENT_IPV6": "0", "EXCLUDE_NAMESPACES": "kube-system, monitoring",
    "AMBIENT_ENABLEMENT_SELECTOR": "- podSelector:\n    matchLabels: {mesh: 'yes'}\n", "NATIVE_NFTABLES": "true",
    "HOST_PROBE_SNAT_IP": "169.254.9.9", "HOST_PROBE_SNAT_IPV6": "fd16::9", "ZTUNNEL_UDS_ADDRESS": "/run/z/z.sock",
    "MONITORING_PORT": "15099", "logging.level": "default:warn,cni:debug", "cniBinDir": "/opt/x/bin",
    "cniConfDir": "/etc/x/net.d",
}  # fmt: skip
OURS = {
    "dns_capture": False, "ipv6": False, "exclude_namespaces": ["kube-system", "monitoring"],
    "enablement_selectors": [{"podSelector": {"matchLabels": {"mesh": "yes"}}}], "backend": "nftables",
    "probe_ipv4": "169.254.9.9", "probe_ipv6": "fd16::9", "zds_socket": "/run/z/z.sock",
    "metrics_address": "0.0.0.0:15099", "log_level": "warning", "cni_bin_dir": "/opt/x/bin",
    "cni_conf_dir": "/etc/x/net.d",
}  # fmt: skip


def test_every_setting_has_its_equivalent_and_builds() -> None:
    found = translate(ALL)
    assert found.settings == OURS and not found.remarks
    build({key: (value, key) for key, value in found.settings.items()})
    assert {one.ours for one in TABLE if one.ours} <= set(DECLARED)


@pytest.mark.parametrize(
    ("found", "ours"),
    [({"FORCE_IPTABLES_BINARY": "legacy"}, "iptables-legacy"), ({"FORCE_IPTABLES_BINARY": "nft"}, "iptables"),
     ({"NATIVE_NFTABLES": "false"}, None), ({"NATIVE_NFTABLES": True}, "nftables")],
)  # fmt: skip
def test_the_backend(found: dict[str, Any], ours: str | None) -> None:
    assert translate(found).settings.get("backend") == ours


def test_what_has_no_equivalent_is_told_unless_it_is_as_here() -> None:
    plain = {one.name: one.plain[0] for one in TABLE if not one.ours and one.plain}
    assert translate(plain).remarks == ()
    told = translate({"AMBIENT_ENABLED": False, "REPAIR_DELETE_PODS": "true", "cniBinDir": "x", "NEW": 1}).remarks
    assert [words.split(":")[0] for words in told] == [
        "AMBIENT_ENABLED false",
        "cniBinDir x",
        "REPAIR_DELETE_PODS true",
        "NEW",
    ]


# The values of istio-cni's chart (docs/design/istio-cni.md, 1.3), without those of its pod.
CHART = """
cniBinDir: /opt/cni/bin
cniConfDir: /etc/cni/net.d
cniConfFileName: ""
cniNetnsDir: /var/run/netns
istioOwnedCNIConfigFileName: ""
istioOwnedCNIConfig: false
excludeNamespaces: [kube-system]
chained: true
provider: default
logging: {level: ""}
ambient:
  enabled: true
  enablementSelectors:
  - podSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}
  - podSelector: {matchExpressions: [{key: istio.io/dataplane-mode, operator: NotIn, values: [none]}]}
    namespaceSelector: {matchLabels: {istio.io/dataplane-mode: ambient}}
  dnsCapture: true
  ipv6: true
  reconcileIptablesOnStartup: true
  shareHostNetworkNamespace: false
  enableAmbientDetectionRetry: true
repair:
  {enabled: true, labelPods: false, deletePods: false, repairPods: true, initContainerName: istio-validation,
   brokenPodLabelKey: cni.istio.io/uninitialized, brokenPodLabelValue: "true"}
global: {logAsJson: false, nativeNftables: false, logging: {level: info}}
env: {}
"""


def test_the_defaults_of_its_chart_are_ours_where_its_directories_are_the_runtimes() -> None:
    facts = MigrationFacts(
        directory="/etc/cni/net.d", plugins="/opt/cni/bin", view=View(), settings=read(yaml.safe_load_all(CHART))
    )
    found = translated_of(facts)
    assert differences(found, Settings()) == found.remarks == ()


def test_what_has_no_equivalent_here_is_mentioned() -> None:
    text = """
cniNetnsDir: /run/x
global: {platform: k3s, logAsJson: true}
repair: {repairPods: false, brokenPodLabelKey: x}
env: {SYSTEM_NAMESPACE: mesh, CNI_CONF_GROUP_READ: "true", SOMETHING_NEW: "1", GOMEMLIMIT: 1GiB}
"""
    found = translate(read(yaml.safe_load_all(text)))
    assert found.settings == {"exempt_pods": ["mesh/ztunnel-*"]}
    assert [words.partition(": ")[0] for words in found.remarks] == [
        "REPAIR_BROKEN_POD_LABEL_KEY x", "cniNetnsDir /run/x", "global.platform k3s", "global.logAsJson true",
        "CNI_CONF_GROUP_READ true", "SOMETHING_NEW",
    ]  # fmt: skip


def test_differences_name_both_sides() -> None:
    lines = differences(translate({"AMBIENT_DNS_CAPTURE": "false", "EXCLUDE_NAMESPACES": "kube-system"}), Settings())
    assert lines == ("dns_capture: False (here: True)",)


HELM = """
_internal_defaults_do_not_set:
  excludeNamespaces: [a]
  ambient: {dnsCapture: false}
  global: {nativeNftables: true}
"""
OPERATOR = """
kind: IstioOperator
spec: {values: {cni: {excludeNamespaces: [a], ambient: {dnsCapture: false}}, global: {nativeNftables: true}}}
"""
PLAIN = "cni:\n  excludeNamespaces: [a]\n  ambient: {dnsCapture: false}\nglobal: {nativeNftables: true}"
CONFIGMAP = """
kind: List
items:
- kind: ConfigMap
  data: {AMBIENT_ENABLED: "true", EXCLUDE_NAMESPACES: a, NATIVE_NFTABLES: "true", AMBIENT_IPV6: "true"}
- kind: Service
"""


@pytest.mark.parametrize(
    "text",
    [
        HELM,
        OPERATOR,
        CONFIGMAP,
        "cni:\n  excludeNamespaces: [a]\n  ambient: {dnsCapture: false}\nglobal: {nativeNftables: true}",
    ],
)
def test_every_form_is_read(text: str) -> None:
    found = translate(read(yaml.safe_load_all(text))).settings
    assert (found["exclude_namespaces"], found["dns_capture"], found["backend"]) == (["a"], False, "nftables")


def test_a_daemonset_tells_its_directories_and_environment() -> None:
    spec = {
        "volumes": [{"name": "cni-bin-dir", "hostPath": {"path": "/home/kubernetes/bin"}}, {"name": "x"}],
        "containers": [{"env": [{"name": "EXCLUDE_NAMESPACES", "value": "a"}, {"name": "NODE_NAME", "valueFrom": {}}]}],
    }
    found = read([{"kind": "DaemonSet", "spec": {"template": {"spec": spec}}}])
    assert found == {"cniBinDir": "/home/kubernetes/bin", "EXCLUDE_NAMESPACES": "a"}


def test_its_entry_in_a_configuration_is_read() -> None:
    entry = {"type": "istio-cni", "exclude_namespaces": ["a"], "native_nftables": True, "plugin_log_level": "info"}
    assert translate(of_entry(entry)).settings == {"exclude_namespaces": ["a"], "backend": "nftables"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["kind", "data", "spec", "template", "items", "cni", "ambient", "dnsCapture", "env",
                         "containers", "volumes", "name", "AMBIENT_ENABLEMENT_SELECTOR", "excludeNamespaces",
                         "global"]), inner, max_size=4),
    max_leaves=5,
)  # fmt: skip


@hypothesis(max_examples=60)
@given(st.lists(JSON, max_size=2), st.sampled_from(["List", "ConfigMap", "DaemonSet", "IstioOperator", None, 7]))
def test_nothing_is_too_odd(documents: list[Any], kind: Any) -> None:
    documents = [{**one, "kind": kind} if isinstance(one, dict) else one for one in documents]
    translate(read(documents))


@hypothesis(max_examples=60)
@given(st.dictionaries(st.sampled_from([one.name for one in TABLE]), JSON))
def test_no_value_is_too_odd(found: dict[str, Any]) -> None:
    translated = translate(found)
    differences(translated, Settings())


def test_the_guide_has_the_table() -> None:
    guide = (Path(__file__).parents[3] / "docs/migrating.md").read_text()
    for one in TABLE:
        row = next(line for line in guide.splitlines() if line.startswith(f"| `{one.helm}` |"))
        assert all(word in row for word in (one.env, one.ours, one.words))

# SPDX-License-Identifier: Apache-2.0
"""Settings: every kind of value, and every mistake with its place."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from agent.core.errors import SettingsError
from agent.core.settings import DECLARED, Settings, build


def one(key: str, value: Any) -> Any:
    return getattr(build({key: (value, "f:1")}), key)


def test_without_any_layer_the_defaults_hold() -> None:
    assert build() == build({}, {}) == Settings()
    assert (Settings().cni_socket, Settings().admin_socket) == ("/run/sluice/cni.sock", "/run/sluice/agent.sock")


def test_every_setting_has_its_help_and_takes_its_own_default() -> None:
    assert set(DECLARED) == {field.name for field in fields(Settings)}
    for field in fields(Settings):
        value = list(field.default) if isinstance(field.default, tuple) else field.default
        assert field.name == "enablement_selectors" or one(field.name, value) == field.default


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("node_name", "n1", "n1"),
        ("dns_capture", False, False),
        ("dns_capture", "false", False),
        ("ipv6", "TRUE", True),
        ("verify_seconds", 5, 5.0),
        ("verify_seconds", "0.5", 0.5),
        ("ack_seconds", 3600, 3600.0),
        ("exclude_namespaces", "a, b,,", ("a", "b")),
        ("exclude_namespaces", ["a", "b"], ("a", "b")),
        ("exclude_namespaces", "", ()),
        ("backend", "iptables", "iptables"),
        ("log_level", "debug", "debug"),
        ("run_dir", "/tmp/x", "/tmp/x"),
        ("backend", "ebpf", "ebpf"),
        ("bpf_dir", "/sys/fs/bpf/x", "/sys/fs/bpf/x"),
        ("bpf_sizes", "pods=10, handover=0100", ("pods=10", "handover=100")),
        ("metrics_address", "", ""),
        ("metrics_address", "[::]:1", "[::]:1"),
        ("probe_ipv4", "10.0.0.1", "10.0.0.1"),
        ("probe_ipv6", "FD00::0:1", "fd00::1"),
        ("accounting", "inet_diag", "inet_diag"),
        ("connection_log", "-", "-"),
        ("connection_log", "/var/log/c.json", "/var/log/c.json"),
        ("connection_log_bytes", 65536, 65536),
        ("connection_log_bytes", "1000000", 1000000),
        ("connection_log_keep", "0", 0),
        ("connection_log_sample", 100, 100),
        ("metrics_expire_seconds", "60", 60.0),
    ],
)
def test_values(key: str, value: Any, taken: Any) -> None:
    assert one(key, value) == taken


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bpf_sizes", "pods"),
        ("bpf_sizes", "pods=0"),
        ("bpf_sizes", "exits=5"),
        ("bpf_sizes", "pods=99999999"),
        ("dns_capture", "yes"),
        ("dns_capture", 1),
        ("dns_capture", None),
        ("verify_seconds", 0),
        ("verify_seconds", -1),
        ("verify_seconds", 3601),
        ("verify_seconds", "nan"),
        ("verify_seconds", "soon"),
        ("verify_seconds", True),
        ("verify_seconds", None),
        ("verify_seconds", 10**400),
        ("exclude_namespaces", 7),
        ("exclude_namespaces", None),
        ("exclude_namespaces", [1]),
        ("node_name", 7),
        ("backend", "ebpf9"),
        ("log_level", "loud"),
        ("run_dir", "run"),
        ("bpf_dir", "sys/fs/bpf"),
        ("bpf_dir", "/" + "x" * 90),
        ("host_probes", "ebpf"),
        ("zds_socket", "/" + "x" * 90),
        ("metrics_address", "15014"),
        ("metrics_address", ":15014"),
        ("metrics_address", "host:0"),
        ("metrics_address", "host:65536"),
        ("metrics_address", "host:²"),
        ("metrics_address", "host:" + "9" * 5000),
        ("probe_ipv4", "fd00::1"),
        ("probe_ipv6", "10.0.0.1"),
        ("probe_ipv4", "x"),
        ("accounting", "on"),
        ("connection_log", "c.json"),
        ("connection_log_bytes", 65535),
        ("connection_log_bytes", "1e9"),
        ("connection_log_bytes", "100M"),
        ("connection_log_bytes", 65536.0),
        ("connection_log_keep", -1),
        ("connection_log_keep", True),
        ("connection_log_keep", None),
        ("connection_log_keep", "²"),
        ("connection_log_sample", 0),
        ("metrics_label_sets", "9" * 5000),
        ("metrics_label_sets", 10**400),
    ],
)
def test_bad_values_are_refused_with_place_and_key(key: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"^f:1: {key}: .* is not "):
        one(key, value)


def test_an_unknown_key_is_refused_with_its_place_and_what_is_known() -> None:
    with pytest.raises(SettingsError, match=r"^\$SLUICE_BACKND: unknown setting 'backnd'; known: node_name.*backend"):
        build({}, {"backnd": ("nftables", "$SLUICE_BACKND")})


def test_later_layers_win_key_by_key() -> None:
    settings = build(
        {"backend": ("nftables", "f:1"), "node_name": ("a", "f:2"), "ipv6": (False, "f:3")},
        {"backend": ("iptables", "$SLUICE_BACKEND"), "node_name": ("b", "$SLUICE_NODE_NAME")},
        {"node_name": ("c", "--node-name")},
    )
    assert (settings.backend, settings.node_name, settings.ipv6) == ("iptables", "c", False)


def test_a_bad_value_is_refused_also_where_a_later_layer_overrides_it() -> None:
    with pytest.raises(SettingsError, match=r"^f:1: backend"):
        build({"backend": ("x", "f:1")}, {"backend": ("auto", "--backend")})

# SPDX-License-Identifier: Apache-2.0
"""Istio's environment variables as settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.errors import SettingsError
from agent.ztunnel.ztunnel_settings import ZtunnelSettings, check, from_environment, worker_count

# What Istio's chart ztunnel gives its DaemonSet, less variables of the language's runtime.
CHART = {
    "CA_ADDRESS": "istiod.istio-system.svc:15012", "XDS_ADDRESS": "istiod.istio-system.svc:15012",
    "LOG_FORMAT": "json", "NETWORK": "north", "RUST_LOG": "info", "RUST_BACKTRACE": "1",
    "ISTIO_META_CLUSTER_ID": "c1", "INPOD_ENABLED": "true", "TERMINATION_GRACE_PERIOD_SECONDS": "30",
    "POD_NAME": "ztunnel-x7k2p", "POD_NAMESPACE": "istio-system", "NODE_NAME": "node-1", "INSTANCE_IP": "10.1.2.3",
    "SERVICE_ACCOUNT": "ztunnel", "ISTIO_META_ENABLE_HBONE": "true", "ZTUNNEL_CPU_LIMIT": "8",
}  # fmt: skip


def test_the_daemonset_of_istios_chart_needs_no_other_setting() -> None:
    settings, unknown = from_environment(CHART)
    assert unknown == []
    check(settings)
    assert settings == ZtunnelSettings(
        mesh="https://istiod.istio-system.svc:15012", identities="istio:https://istiod.istio-system.svc:15012",
        access_log_json=True, network="north", cluster_id="c1", drain_seconds=25.0, pod_name="ztunnel-x7k2p",
        pod_namespace="istio-system", node_name="node-1", pod_ip="10.1.2.3",
        metadata={"CLUSTER_ID": "c1", "ENABLE_HBONE": "true"},
    )  # fmt: skip


def test_what_would_change_something_and_is_not_understood_is_named() -> None:
    given = {
        "XDS_ON_DEMAND": "true", "POOL_MAX_STREAMS_PER_CONNECTION": "9", "HOME": "/", "PROXY_MODE": "dedicated",
        "ISTIO_META_DNS_PROXY_ADDR": "127.0.0.1:53", "ISTIO_METAJSON_LABELS": "{}", "ENABLE_PROXY": "True",
        "KEEPALIVE_TIME": "180s", "KEEPALIVE_RETRIES": "3",
    }  # fmt: skip
    assert from_environment(given)[1] == [
        "ISTIO_METAJSON_LABELS", "ISTIO_META_DNS_PROXY_ADDR", "KEEPALIVE_RETRIES", "POOL_MAX_STREAMS_PER_CONNECTION",
        "PROXY_MODE", "XDS_ON_DEMAND",
    ]  # fmt: skip


def test_the_metadata_of_istio_comes_before_its_own_variables_and_may_leave_dns_to_the_resolvers() -> None:
    settings, _ = from_environment({"ISTIO_META_CLUSTER_ID": "c1", "CLUSTER_ID": "c2"})
    assert settings.cluster_id == "c1" and settings.mesh_names
    assert not from_environment({"ISTIO_META_DNS_CAPTURE": "false"})[0].mesh_names
    assert from_environment({"ISTIO_META_DNS_CAPTURE": "TRUE"})[0].mesh_names


@pytest.mark.parametrize(
    ("variable", "value"),
    [("SECRET_TTL", "a day"), ("ENABLE_RESPONSE_BAGGAGE", "yes"), ("TERMINATION_GRACE_PERIOD_SECONDS", "long")],
)
def test_a_value_of_another_kind_is_an_error_that_names_the_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"environment variable {variable}: '{value}'"):
        from_environment({variable: value})


@pytest.mark.parametrize(
    ("text", "cores", "workers"),
    [
        ("1", 8, 1),
        ("3", 8, 3),
        ("auto", 2, 2),
        ("auto", 32, 8),
        ("0", 6, 6),
        ("25%", 16, 4),
        ("10%", 4, 1),
        ("1%", 99, 1),
    ],
)
def test_workers_are_a_number_or_a_part_of_the_cores(text: str, cores: int, workers: int) -> None:
    assert worker_count(text, cores) == workers
    assert from_environment({"ZTUNNEL_WORKER_THREADS": text}, cores)[0].workers == workers


@pytest.mark.parametrize("text", ["", "many", "-1", "%", "1.5"])
def test_other_workers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither auto nor a number"):
        worker_count(text, 4)


@pytest.mark.parametrize("gateway", ["gw", "gw/gate", "gw/gate/account/more"])
def test_a_gateway_is_a_workload_of_the_mesh(gateway: str) -> None:
    of_mesh = ZtunnelSettings(mesh="/mesh.yaml", identities="files:/identities", gateway="gw/gate/account")
    check(of_mesh)
    for wrong in (replace(of_mesh, gateway=gateway), ZtunnelSettings(gateway="gw/gate/account")):
        with pytest.raises(SettingsError, match="--gateway takes NAMESPACE/POD/SERVICE-ACCOUNT"):
            check(wrong)
    with pytest.raises(SettingsError, match="is not HOST:PORT"):
        check(replace(of_mesh, gateway_address="15008"))


@pytest.mark.parametrize(
    ("limits", "workers"),
    [
        ({"ZTUNNEL_CPU_LIMIT": "8"}, 2),
        ({"ZTUNNEL_RESOURCE_CPU_LIMIT": "2500m", "ZTUNNEL_CPU_LIMIT": "16"}, 1),
        ({"ZTUNNEL_RESOURCE_CPU_LIMIT": "4.5"}, 2),
        ({"ZTUNNEL_RESOURCE_CPU_LIMIT": "128"}, 8),
    ],
)
def test_a_part_of_the_cores_is_of_those_that_the_container_may_use(limits: dict[str, str], workers: int) -> None:
    settings, unknown = from_environment({"ZTUNNEL_WORKER_THREADS": "25%", **limits}, 32)
    assert (settings.workers, unknown) == (workers, [])


def test_a_cpu_limit_that_is_no_quantity_is_an_error() -> None:
    with pytest.raises(SettingsError, match="'many' is no quantity"):
        from_environment({"ZTUNNEL_WORKER_THREADS": "25%", "ZTUNNEL_CPU_LIMIT": "many"}, 32)

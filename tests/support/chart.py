# SPDX-License-Identifier: Apache-2.0
"""The chart: rendered by the real Helm, its settings read as the agent reads them, its objects checked by schemas.

Helm and the schemas of Kubernetes' API are fetched by deploy/manifests/fetch; a helm on the PATH is taken where that
has none for the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent.cli import settings_sources
from agent.core import names
from agent.core.setting_types import Choice, Whole
from agent.core.settings import DECLARED, Settings, build

ROOT = Path(__file__).resolve().parents[2]
CHART, MANIFESTS, KUBE = ROOT / "deploy/chart/sluice", ROOT / "deploy/manifests", ROOT / "build/kube"
# Where a release goes in the tests and in the plain manifests.
NAMESPACE = "sluice-system"
Objects = list[dict[str, Any]]
# Settings that the chart gives each pod itself: a value of theirs would be wrong on every node but one.
NOT_IN_VALUES = ("node_name",)


@cache
def fetched() -> str:
    """Empty when everything is there; otherwise why not."""
    done = subprocess.run([MANIFESTS / "fetch"], capture_output=True, text=True, timeout=300)
    return "" if done.returncode == 0 else (done.stderr or done.stdout).strip()


def need_tools() -> None:
    """Outside CI a machine without the package index skips what needs it."""
    if problem := fetched():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)


@cache
def helm() -> str:
    need_tools()
    found = KUBE / "helm"
    path = str(found) if found.exists() else shutil.which("helm")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no helm for this machine")
    return str(path)


class HelmError(Exception):
    """What helm said."""


def template(values: Mapping[str, Any], *options: str) -> str:
    """helm template, as text. Raises HelmError."""
    argv = [helm(), "template", "sluice", str(CHART), "--namespace", NAMESPACE, "--values", "-", *options]
    done = subprocess.run(argv, input=yaml.safe_dump(dict(values)), capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise HelmError(done.stderr)
    return done.stdout


def render(values: Mapping[str, Any], *options: str) -> list[dict[str, Any]]:
    """The objects, in order. Raises HelmError."""
    return [one for one in yaml.safe_load_all(template(values, *options)) if one]


def only(objects: Objects, kind: str, name: str = "sluice") -> dict[str, Any]:
    found = [one for one in objects if one["kind"] == kind and one["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind}/{name}"
    return found[0]


def pod(objects: Objects, name: str = "sluice") -> dict[str, Any]:
    spec: dict[str, Any] = only(objects, "DaemonSet", name)["spec"]["template"]["spec"]
    return spec


def agent(objects: Objects) -> dict[str, Any]:
    one: dict[str, Any] = pod(objects)["containers"][0]
    return one


def ztunnel(objects: Objects) -> dict[str, Any]:
    one: dict[str, Any] = pod(objects, "sluice-ztunnel")["containers"][0]
    return one


def metadata(objects: Objects) -> dict[str, Any]:
    one: dict[str, Any] = only(objects, "DaemonSet")["spec"]["template"]["metadata"]
    return one


def kinds(objects: Objects) -> set[str]:
    return {one["kind"] for one in objects}


def rules(objects: Objects) -> str:
    return json.dumps(only(objects, "ClusterRole")["rules"])


def mounted(objects: Objects, path: str, source: str) -> bool:
    """The agent has the host's `source` at `path`."""
    names = [one["name"] for one in agent(objects)["volumeMounts"] if one["mountPath"] == path]
    volumes = {one["name"]: one.get("hostPath", {}).get("path") for one in pod(objects)["volumes"]}
    return [volumes[name] for name in names] == [source]


def settings(objects: Objects, directory: Path) -> Settings:
    """What the agent makes of the ConfigMap, by its own code. Raises SettingsError."""
    path = directory / "sluice.yaml"
    path.write_text(only(objects, "ConfigMap")["data"]["sluice.yaml"])
    return build(settings_sources._file(str(path)))


def leaves(schema: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every value that the schema names: "image.tag". What is free within is one value."""
    for key, part in schema["properties"].items():
        if "properties" in part:
            yield from leaves(part, f"{prefix}{key}.")
        else:
            yield prefix + key


def settings_schema() -> dict[str, Any]:
    """Of the value `settings`, from the agent's own table."""
    kinds: Mapping[str, dict[str, Any]] = {
        "bool": {"type": ["boolean", "null"]},
        "int": {"type": ["integer", "null"]},
        "float": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 3600},
        "str": {"type": ["string", "null"]},
    }
    found: dict[str, Any] = {}
    for field in fields(Settings):
        if field.name in NOT_IN_VALUES:
            continue
        kind = str(field.type)
        listed = {"type": ["array", "null"], "items": {"type": "object" if "Selector" in kind else "string"}}
        part = dict(kinds.get(kind, listed)) | {"description": DECLARED[field.name].help}
        match DECLARED[field.name].kind:
            case Choice(words, former):
                part["enum"] = [*words, *former, None]
            case Whole(least, most):
                part["minimum"], part["maximum"] = least, most
        found[field.name] = part
    return {"type": "object", "additionalProperties": False, "properties": found}


def unusual() -> dict[str, Any]:
    """A value for each setting that is neither its default nor another's."""
    special: dict[str, Any] = {
        "run_dir": "/run/elsewhere", "bpf_dir": "/sys/fs/bpf/elsewhere", "bpf_sizes": [f"{names.BPF_MAPS[0]}=4321"],
        "zds_socket": "/run/other/zds.sock", "metrics_address": "127.0.0.2:15999", "dns_resolvers": ["10.7.7.7"],
        "probe_ipv4": "169.254.9.9", "probe_ipv6": "fd00::77", "kube_server": "https://10.77.0.1:6443",
        "kube_token_file": "/etc/token", "kube_ca_file": "/etc/ca", "exempt_pods": ["web/odd-*"],
        "enablement_selectors": [{"podSelector": {"matchLabels": {"odd": "yes"}}}], "cni_conf_name": "07-odd.conflist",
        "cni_conf_dir": "/odd/net.d", "cni_bin_dir": "/odd/bin", "cni_plugin": "/odd/sluice-cni",
        "host_root": "/odd-host", "connection_log": "/var/log/odd/c.log", "connection_log_bytes": 123456789,
        "connection_log_keep": 9, "history_bytes": 123456,
        "connection_log_sample": 1000000, "metrics_label_sets": 1000000,
        "ztunnel_ports": ["4321"],
    }  # fmt: skip
    found: dict[str, Any] = {}
    for number, field in enumerate(fields(Settings)):
        default, name = getattr(Settings(), field.name), field.name
        if name in NOT_IN_VALUES:
            continue
        if name in special:
            found[name] = special[name]
        elif isinstance(choice := DECLARED[name].kind, Choice):
            found[name] = next(one for one in reversed(choice.words) if one != default)
        elif isinstance(default, bool):
            found[name] = not default
        elif isinstance(default, float):
            found[name] = 100 + number + 0.5
        elif isinstance(default, tuple):
            found[name] = [f"odd-{number}"]
        else:
            found[name] = f"/odd/{name}"
    return found


@cache
def _validator(version: str, definition: str) -> Callable[[Any], Any]:
    sys.path.append(str(KUBE / "python"))
    try:
        import fastjsonschema  # type: ignore[import-not-found]
    finally:
        sys.path.pop()
    directory = KUBE / "schemas" / version

    def named(uri: str) -> Any:  # the definitions, which are beside
        return json.loads((directory / uri.rpartition("/")[2]).read_text())

    handlers = {scheme: named for scheme in ("", "http", "https")}
    schema = json.loads((directory / f"{definition}.json").read_text())
    made: Callable[[Any], Any] = fastjsonschema.compile(schema, handlers=handlers, use_default=False)
    return made


def validate(one: Mapping[str, Any], version: str) -> None:
    """By the strict schema of one version of the API: unknown keys are refused. Raises with what is wrong."""
    group, _, number = one["apiVersion"].rpartition("/")
    short = group.removesuffix(".k8s.io").partition(".")[0]
    words = [one["kind"].lower(), *([short] if short else []), number]
    _validator(version, "-".join(words))(one)


def versions() -> list[str]:
    need_tools()
    return sorted((one.name for one in (KUBE / "schemas").iterdir()), key=lambda name: int(name.split(".")[1]))

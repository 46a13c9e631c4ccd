# SPDX-License-Identifier: Apache-2.0
"""Reads settings from file, environment and flags; each value keeps its place for error messages."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.core import names
from agent.core.errors import SettingsError
from agent.core.settings import DECLARED, Settings, build

_ENVIRONMENT = "SLUICE_"
_NOT_SETTINGS = {"SLUICE_CONFIG"}
# What Kubernetes gives every pod of a namespace that has a Service named sluice or sluice-something.
_SERVICE = re.compile(r"SLUICE_([A-Z0-9_]+_)?(SERVICE|PORT)(_|$)")
Layer = dict[str, tuple[Any, str]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds --config and one flag per setting."""
    parser.add_argument(
        "--config",
        default=os.environ.get("SLUICE_CONFIG", ""),
        metavar="FILE",
        help="settings as YAML (or $SLUICE_CONFIG)",
    )
    group = parser.add_argument_group("settings", "also keys of the file, and $SLUICE_<NAME> in the environment")
    for one in DECLARED.values():
        text = one.help if "(default:" in one.help else f"{one.help} (default: {default(one.default)})"
        group.add_argument("--" + one.name.replace("_", "-"), metavar=one.kind.takes, help=text.replace("%", "%%"))


def default(value: object) -> str:
    """Formats a default as a user would write it; "none" for an empty one."""
    if isinstance(value, bool):
        return str(value).lower()
    return (", ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "none"


def load(args: argparse.Namespace, variables: Mapping[str, str] = os.environ) -> Settings:
    """Returns the settings. Raises SettingsError, with file and line, flag or variable."""
    return build(*_layers(args, variables))


def origins(args: argparse.Namespace) -> dict[str, str]:
    """Returns where each given setting comes from, as error messages name it. Raises SettingsError."""
    return {key: source for layer in _layers(args) for key, (_, source) in layer.items()}


def _layers(args: argparse.Namespace, variables: Mapping[str, str] = os.environ) -> list[Layer]:
    """Returns the layers of settings; later ones win."""
    flags = {
        name: (value, "--" + name.replace("_", "-")) for name in DECLARED if (value := getattr(args, name)) is not None
    }
    file = _file(args.config) if args.config else {}
    return [cluster(variables), file, environment(variables), flags]


def cluster(variables: Mapping[str, str], account: Path = Path(names.SERVICE_ACCOUNT)) -> Layer:
    """Returns what a pod of a Kubernetes cluster knows of itself; explicit settings override it."""
    host, port = (variables.get(f"KUBERNETES_SERVICE_{word}", "") for word in ("HOST", "PORT"))
    if not host or not port:
        return {}
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    layer: Layer = {"kube_server": (url, "$KUBERNETES_SERVICE_HOST")}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        own = account / "namespace"
        layer["own_namespace"] = (own.read_text().strip(), str(own))
    return layer


def environment(variables: Mapping[str, str]) -> Layer:
    return {
        name.removeprefix(_ENVIRONMENT).lower(): (value, f"${name}")
        for name, value in variables.items()
        if name.startswith(_ENVIRONMENT) and name not in _NOT_SETTINGS and not _SERVICE.match(name)
    }


def _file(path: str) -> Layer:
    import yaml  # takes longer than all other settings code, and a start without a file does not need it

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # PyYAML raises all of them
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SettingsError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise SettingsError(f"{path}:1: not a mapping of settings to values")
    return {str(key.value): (values.get(key.value), f"{path}:{key.start_mark.line + 1}") for key, _ in root.value}

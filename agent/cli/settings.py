"""Settings from file, environment and flags; each value keeps its place for error messages."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from agent.core import names
from agent.core.errors import SettingsError
from agent.core.settings import HELP, Settings, build

_ENVIRONMENT = "SLUICE_"
_NOT_SETTINGS = {"SLUICE_CONFIG"}
# What Kubernetes gives every pod of a namespace that has a Service named sluice or sluice-something.
_SERVICE = re.compile(r"SLUICE_([A-Z0-9_]+_)?(SERVICE|PORT)(_|$)")
Layer = dict[str, tuple[Any, str]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """--config and one flag per setting."""
    default = os.environ.get("SLUICE_CONFIG", "")
    parser.add_argument("--config", default=default, metavar="FILE", help="settings as YAML (or $SLUICE_CONFIG)")
    group = parser.add_argument_group("settings", "also keys of the file, and $SLUICE_<NAME> in the environment")
    for field in fields(Settings):
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            metavar="VALUE",
            help=f"{HELP[field.name]} (default: {shown if shown != '' else 'none'})".replace("%", "%%"),
        )


def load(args: argparse.Namespace) -> Settings:
    """Raises SettingsError, with file and line, flag or variable."""
    flags = {
        field.name: (value, "--" + field.name.replace("_", "-"))
        for field in fields(Settings)
        if (value := getattr(args, field.name)) is not None
    }
    file = _file(args.config) if args.config else {}
    return build(cluster(os.environ), file, environment(os.environ), flags)


def cluster(variables: Mapping[str, str], account: Path = Path(names.SERVICE_ACCOUNT)) -> Layer:
    """What a pod of a Kubernetes cluster knows of itself; anything that was set wins over it."""
    host, port = (variables.get(f"KUBERNETES_SERVICE_{word}", "") for word in ("HOST", "PORT"))
    if not host or not port:
        return {}
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    found: Layer = {"kube_server": (url, "$KUBERNETES_SERVICE_HOST")}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        own = account / "namespace"
        found["own_namespace"] = (own.read_text().strip(), str(own))
    return found


def environment(variables: Mapping[str, str]) -> Layer:
    return {
        name.removeprefix(_ENVIRONMENT).lower(): (value, f"${name}")
        for name, value in variables.items()
        if name.startswith(_ENVIRONMENT) and name not in _NOT_SETTINGS and not _SERVICE.match(name)
    }


def _file(path: str) -> Layer:
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

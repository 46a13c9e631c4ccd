# SPDX-License-Identifier: Apache-2.0
"""The CNI directories in configurations of container runtimes. Pure: the texts of the files come as arguments.

Facts: containerd's docs/cri/config.md and containerd-config.toml(5); crio.conf(5) and crio.conf.d(5).
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

CONF_DIR: Final = "/etc/cni/net.d"
BIN_DIR: Final = "/opt/cni/bin"
# The section of the CRI plugin in configurations of version 1, 2 and 3.
_CRI: Final = ("cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime")


@dataclass(frozen=True, slots=True)
class RuntimeDirectories:
    """Directories of the host, in the order in which the runtime searches; empty where none is set.

    `several`: the runtime attaches a pod to more lists than the first.
    """

    conf_dir: str = ""
    bin_dirs: tuple[str, ...] = ()
    several: bool = False


def imports(text: str) -> list[str]:
    """Returns the patterns of further files of containerd. Raises ValueError."""
    imported = tomllib.loads(text).get("imports")
    return [one for one in imported if isinstance(one, str)] if isinstance(imported, list) else []


def containerd(texts: Iterable[str], variables: Mapping[str, str]) -> RuntimeDirectories:
    """Reads the text of the main file, then those of its imports, which win. Raises ValueError.

    `variables` are values for names as in "${SNAP_DATA}".
    """
    merged: dict[str, Any] = {}
    for text in texts:
        merged = _merge(merged, tomllib.loads(text))
    directories = RuntimeDirectories()
    for section in _CRI:
        cni = _table(_table(_table(merged, "plugins"), section), "cni")
        many = _texts(cni.get("bin_dirs")) or _texts(cni.get("bin_dir"))
        conf = _texts(cni.get("conf_dir"))
        several = cni.get("max_conf_num", 1) != 1 or directories.several  # 0 is all of them
        directories = RuntimeDirectories(
            conf[0] if conf else directories.conf_dir, many or directories.bin_dirs, several
        )
    bins = tuple(_expand(one, variables) for one in directories.bin_dirs)
    return RuntimeDirectories(_expand(directories.conf_dir, variables), bins, directories.several)


def crio(texts: Iterable[str]) -> RuntimeDirectories:
    """Reads crio.conf, then its drop-ins in the order of their names; a later key wins. Raises ValueError."""
    directories = RuntimeDirectories()
    for text in texts:
        network = _table(_table(tomllib.loads(text), "crio"), "network")
        conf = _texts(network.get("network_dir"))
        many = _texts(network.get("plugin_dirs")) or _texts(network.get("plugin_dir"))
        directories = RuntimeDirectories(conf[0] if conf else directories.conf_dir, many or directories.bin_dirs)
    return directories


def _table(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = value.get(key)
    return table if isinstance(table, dict) else {}


def _texts(value: object) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list):
        return ()
    return tuple(one.rstrip("/") or "/" for one in given if isinstance(one, str) and one)


def _expand(text: str, variables: Mapping[str, str]) -> str:
    for name, value in variables.items():
        text = text.replace("${" + name + "}", value)
    return text


def _merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    merged = dict(one)
    for key, value in other.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged

"""What configurations of container runtimes say of CNI. Pure: the files' texts come as arguments.

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
    """Directories of the host, in the order in which the runtime searches; empty where nothing is said.

    `several`: the runtime attaches a pod to more lists than the first.
    """

    conf_dir: str = ""
    bin_dirs: tuple[str, ...] = ()
    several: bool = False


def imports(text: str) -> list[str]:
    """Patterns of further files of containerd's. Raises ValueError."""
    found = tomllib.loads(text).get("imports")
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def containerd(texts: Iterable[str], variables: Mapping[str, str]) -> RuntimeDirectories:
    """The main file's text, then those of its imports, which win; `variables` as in "${SNAP_DATA}".

    Raises ValueError.
    """
    merged: dict[str, Any] = {}
    for text in texts:
        merged = _merge(merged, tomllib.loads(text))
    said = RuntimeDirectories()
    for section in _CRI:
        cni = _table(_table(_table(merged, "plugins"), section), "cni")
        many = _texts(cni.get("bin_dirs")) or _texts(cni.get("bin_dir"))
        conf = _texts(cni.get("conf_dir"))
        several = cni.get("max_conf_num", 1) != 1 or said.several  # 0 is all of them
        said = RuntimeDirectories(conf[0] if conf else said.conf_dir, many or said.bin_dirs, several)
    bins = tuple(_expand(one, variables) for one in said.bin_dirs)
    return RuntimeDirectories(_expand(said.conf_dir, variables), bins, said.several)


def crio(texts: Iterable[str]) -> RuntimeDirectories:
    """crio.conf, then its drop-ins in the order of their names; each key of a later one wins. Raises ValueError."""
    said = RuntimeDirectories()
    for text in texts:
        network = _table(_table(tomllib.loads(text), "crio"), "network")
        conf = _texts(network.get("network_dir"))
        many = _texts(network.get("plugin_dirs")) or _texts(network.get("plugin_dir"))
        said = RuntimeDirectories(conf[0] if conf else said.conf_dir, many or said.bin_dirs)
    return said


def _table(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


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
    made = dict(one)
    for key, value in other.items():
        old = made.get(key)
        made[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return made

# SPDX-License-Identifier: Apache-2.0
"""istio-cni's entries in a directory of CNI configurations, and the configurations without them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agent.core.errors import SettingsError
from agent.core.names import CNI_TYPE
from agent.install import conflists
from agent.install.conflists import ISTIO, Conf, Json, istio_entry, istio_form
from agent.install.planning import View
from agent.migration.istio_agent import RUN_DIR

# Kept by a take-over under names that no runtime reads: a whole file, or one from before its entry was removed.
FILE: Final = f"{conflists.MIGRATED}file-"
ENTRY: Final = f"{conflists.MIGRATED}entry-"
KEPT: Final = ".kept"


@dataclass(frozen=True, slots=True)
class IstioConf:
    """A configuration with istio-cni's entry; `entry` is {} where it is nested (Multus' delegates)."""

    conf: Conf
    form: str
    entry: Json


def confs(view: View) -> list[Conf]:
    """Returns every configuration that a runtime could use, in its order."""
    usable = []
    for name in conflists.readable(view.files):
        try:
            usable.append(conflists.parse(name, view.files[name]))
        except SettingsError:
            continue
    return usable


def picked(view: View) -> Conf | None:
    """Returns the configuration that a runtime uses: the first by name that it can use."""
    return next(iter(confs(view)), None)


def mentioning(view: View) -> list[IstioConf]:
    """Returns the configurations with istio-cni's entry, in the order of file names, without our own lists."""
    every = [conf for conf in confs(view) if not conflists.is_own(conf)]
    mentioning = [conf for conf in every if conflists.mentions(conf.network, ISTIO)]
    return [IstioConf(conf, istio_form(conf, every), istio_entry(conf)) for conf in mentioning]


def run_dirs(view: View) -> list[str]:
    """Returns the directories of istio-cni's agent that its entries name, and its default one."""
    named = (str(conf.entry.get("cni_agent_run_dir") or RUN_DIR) for conf in mentioning(view))
    return list(dict.fromkeys((*named, RUN_DIR)))


def added(network: Json, entry: Json) -> Json:
    """Adds istio-cni's entry at the end, but before ours."""
    plugins = list(network["plugins"])
    at = next((n for n, one in enumerate(plugins) if one["type"] == CNI_TYPE), len(plugins))
    return {**network, "plugins": [*plugins[:at], entry, *plugins[at:]]}


def other_entries(view: View) -> Iterator[tuple[str, str, str]]:
    """Yields for each file that a take-over kept: its name, FILE or ENTRY, and its original name."""
    for name in sorted(view.files):
        for kind in (FILE, ENTRY):
            if name.startswith(kind) and name.endswith(KEPT):
                yield name, kind, name.removeprefix(kind).removesuffix(KEPT)

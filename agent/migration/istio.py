"""istio-cni in a directory of CNI configurations: where its entry stands, and the same without it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from agent.core.errors import SettingsError
from agent.core.names import CNI_TYPE
from agent.install import conflists
from agent.install.conflists import ISTIO, Conf, Json
from agent.install.istio import entry, form, mentions
from agent.install.planning import View

# What take-over keeps, under names that no runtime reads: a whole file, or one from before its entry was taken out.
FILE: Final = f"{conflists.MIGRATED}file-"
ENTRY: Final = f"{conflists.MIGRATED}entry-"
KEPT: Final = ".kept"


@dataclass(frozen=True, slots=True)
class IstioConf:
    """A configuration with an entry of istio-cni's in it; `entry` is {} where it is deep inside (Multus' delegates)."""

    conf: Conf
    form: str
    entry: Json


def confs(view: View) -> list[Conf]:
    """Every configuration that a runtime could use, in its order."""
    found = []
    for name in conflists.readable(view.files):
        try:
            found.append(conflists.parse(name, view.files[name]))
        except SettingsError:
            continue
    return found


def picked(view: View) -> Conf | None:
    """The one that a runtime uses: the first by name that it can use."""
    return next(iter(confs(view)), None)


def places(view: View) -> list[IstioConf]:
    """In the order of file names. Ours around one of them is none."""
    every = [conf for conf in confs(view) if not conflists.is_own(conf)]
    return [IstioConf(conf, form(conf, every), entry(conf)) for conf in every if mentions(conf.network)]


def without(value: Any) -> Any:
    """Without its entries, at any depth."""
    if isinstance(value, dict):
        return {key: without(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without(one) for one in value if not (isinstance(one, dict) and one.get("type") == ISTIO)]
    return value


def added(network: Json, entry: Json) -> Json:
    """With istio-cni's entry last of all, but before ours."""
    plugins = list(network["plugins"])
    at = next((n for n, one in enumerate(plugins) if one["type"] == CNI_TYPE), len(plugins))
    return {**network, "plugins": [*plugins[:at], entry, *plugins[at:]]}


def other_entries(view: View) -> Iterator[tuple[str, str, str]]:
    """Of each file that take-over keeps: its name, FILE or ENTRY, and the name it had."""
    for name in sorted(view.files):
        for kind in (FILE, ENTRY):
            if name.startswith(kind) and name.endswith(KEPT):
                yield name, kind, name.removeprefix(kind).removesuffix(KEPT)

# SPDX-License-Identifier: Apache-2.0
"""CNI configurations as a runtime reads them; our entry in them: wrapped, inserted, removed; and istio-cni's. Pure.

Facts: ConfFiles, ConfFromBytes, ConfListFromBytes and ConfListFromConf in libcni/conf.go of containernetworking/cni.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from agent.core.errors import SettingsError
from agent.core.names import CNI_TYPE
from agent.core.settings import Settings

Json = dict[str, Any]
EXTENSIONS: Final = (".conf", ".conflist", ".json")  # what runtimes read; in the order of file names
VERSIONS: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")  # what sluice-cni supports, as cni_plugin/config.c
ISTIO: Final = "istio-cni"
# Forms of istio-cni's entry (docs/design/istio-cni.md, 1.10).
CHAINED: Final = "chained"  # in the primary's own list
OWNED: Final = "owned"  # in a list of istio-cni's with the primary's plugins: 02-istio-cni.conflist
ALONE: Final = "alone"  # in a file with this entry only: YYY-istio-cni.conf, with Multus
MIGRATED = ".sluice-istio-"  # prefix of the files in which `sluice migrate` keeps istio-cni's
ORIGINAL, KEPT = ".sluice-original-", ".kept"  # around the name of a file as it was before our entry
MOST: Final = 1 << 20  # bytes; sluice-cni accepts no larger configuration
TIMEOUT: Final = 20  # seconds; a kubelet waits minutes for a sandbox
_DEEPEST = 100
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # sluice-cni refuses a list with any other name


@dataclass(frozen=True, slots=True)
class Conf:
    """One file of the runtime's directory, as a list in any case. `single`: the file holds one plugin, not a list."""

    name: str
    data: bytes
    network: Json
    single: bool

    @property
    def plugins(self) -> list[Json]:
        plugins: list[Json] = self.network["plugins"]
        return plugins

    @property
    def entry(self) -> Json | None:
        """Our entry, if it is one of the list's own plugins."""
        return next((one for one in self.plugins if one["type"] == CNI_TYPE), None)

    @property
    def wraps(self) -> str:
        """The file name of the list that ours was made around; "" if this list is not ours."""
        return str((self.entry or {}).get("wraps", ""))

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]


def plugin_entry(settings: Settings) -> Json:
    """Returns our entry. Nothing in it expires, and the socket that it names may be absent until an agent runs."""
    excluded = dict.fromkeys((*settings.exclude_namespaces, settings.own_namespace))
    return {
        "type": CNI_TYPE,
        "capabilities": {"io.kubernetes.cri.pod-annotations": True, "dns": True},
        "socket": settings.cni_socket,
        "excludeNamespaces": [name for name in excluded if _NAMESPACE.fullmatch(name)],
        "exemptPods": list(settings.exempt_pods),
        "timeoutSeconds": TIMEOUT,
    }


def parse(name: str, data: bytes) -> Conf:
    """Parses a file as a runtime does. Raises SettingsError, which names the file, where a runtime would refuse it.

    It is stricter than Go in one point: a key that occurs twice is ambiguous.
    """

    def refuse(why: str) -> NoReturn:
        raise SettingsError(f"{name}: {why}")

    if len(data) > MOST:
        refuse(f"larger than {MOST} bytes")
    if not name.isprintable():
        raise SettingsError(f"{name!a}: the file name is not printable, so no configuration can contain it")
    if not data.strip(b" \t\r\n\0"):
        refuse("empty")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        refuse(f"not JSON: {str(error) or 'nested too deep'}")
    if not isinstance(value, dict):
        refuse("not a JSON object")
    if _deeper(value, _DEEPEST):
        refuse(f"nested deeper than {_DEEPEST} levels")
    single = not name.endswith(".conflist")
    network = _listed(value) if single else value
    if why := _wrong(network, single=single):
        refuse(why)
    return Conf(name, data, network, single)


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return value


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _finite(word: str) -> float:
    value = float(word)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {word[:40]} is too large")
    return value


def _deeper(value: Any, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        layer = [one for each in layer for one in (each.values() if isinstance(each, dict) else each)
                 if isinstance(one, dict | list)]  # fmt: skip
        if not layer:
            return False
    return True


def _listed(plugin: Json) -> Json:
    """Returns a list of one plugin, as libcni makes it; the plugin keeps all its keys, also those of a list."""
    return {**{key: plugin[key] for key in ("cniVersion", "name") if key in plugin}, "plugins": [plugin]}


def _wrong(network: Json, *, single: bool) -> str:
    plugins = network.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        return "it has no plugins"
    for number, plugin in enumerate(plugins):
        if not isinstance(plugin, dict) or not isinstance(kind := plugin.get("type"), str) or not kind:
            return f"{'the plugin' if single else f'plugins[{number}]'} has no type"
        if "/" in kind or kind in (".", ".."):
            return f"the type {kind!r} is not the name of a file"
    if not isinstance(name := network.get("name"), str) or not name:
        return "it has no name"
    if not isinstance(network.get("cniVersion", ""), str):
        return "cniVersion is not text"
    return ""


def chainable(conf: Conf) -> str:
    """Returns why our plugin cannot follow those of `conf`; empty if it can."""
    version = conf.network.get("cniVersion") or "0.1.0"  # the version of a configuration without this key
    if version in VERSIONS:
        return ""
    old = version[:4] in ("0.1.", "0.2.")
    why = "has no plugin chains, which came with" if old else "is not supported; sluice-cni supports"
    span = VERSIONS[0] if old else f"{VERSIONS[0]} to {VERSIONS[-1]}"
    return f"{conf.name}: cniVersion {version} {why} {span}; set a supported version there if its plugins support one"


def wrap(primary: Conf, entry: Json, file: str) -> bytes:
    """Returns our own list, for `file`: everything in the primary list, in its order, then our entry."""
    return encode(_chained(primary.network, {**entry, "file": file, "wraps": primary.name}))


def insert(primary: Conf, entry: Json, file: str) -> bytes:
    """Returns the primary's own list with our entry, for `file`: a .conflist, even if the primary is not one."""
    return encode(_chained(primary.network, {**entry, "file": file, "from": origin(primary)}))


def rewrap(own: Conf, entry: Json) -> bytes:
    """Returns our own list with the current entry, for the time in which its primary list cannot be read."""
    assert own.entry is not None
    kept: Json = {key: own.entry[key] for key in ("file", "wraps") if key in own.entry}
    return encode(_chained(own.network, {**entry, **kept}))


def strip(conf: Conf) -> bytes:
    """Returns the configuration without our entries, as bytes."""
    return encode(stripped(conf.network))


def _chained(network: Json, entry: Json) -> Json:
    clean = stripped(network)
    chained = {**clean, "plugins": [*clean["plugins"], entry]}
    if isinstance(versions := chained.get("cniVersions"), list):  # the runtime uses the newest that it supports
        chained["cniVersions"] = [one for one in versions if one in VERSIONS]
    return chained


def stripped(value: Any, plugin: str = CNI_TYPE) -> Any:
    """Removes the entries of a plugin, ours, at any depth: Multus keeps whole lists among its delegates."""
    if isinstance(value, dict):
        return {key: stripped(one, plugin) for key, one in value.items()}
    if isinstance(value, list):
        return [stripped(one, plugin) for one in value if not (isinstance(one, dict) and one.get("type") == plugin)]
    return value


def mentions(value: Any, plugin: str = CNI_TYPE) -> bool:
    """Returns True if the value contains an entry of the plugin, ours, at any depth."""
    if isinstance(value, dict):
        return value.get("type") == plugin or any(mentions(one, plugin) for one in value.values())
    return isinstance(value, list) and any(mentions(one, plugin) for one in value)


def origin(conf: Conf) -> str:
    """Returns the name of the file that the list was in before our entry was inserted."""
    origin_name = (conf.entry or {}).get("from")
    names = [conf.stem + end for end in EXTENSIONS]
    return names[names.index(origin_name)] if is_inserted(conf) and origin_name in names else conf.name


def is_own(conf: Conf) -> bool:
    """Returns True if Sluice made the file around another list; a copy by another program has another name."""
    return bool(conf.entry) and "wraps" in (conf.entry or {}) and (conf.entry or {}).get("file") == conf.name


def is_inserted(conf: Conf) -> bool:
    """Returns True if Sluice inserted its entry into this file."""
    return bool(conf.entry) and "wraps" not in (conf.entry or {}) and (conf.entry or {}).get("file") == conf.name


def own_name(wished: str, first: str, behind: str = "") -> str:
    """Returns `wished` if it sorts before `first` and after `behind`; otherwise a name made from `first`.

    "-" sorts before ".": 00-multus-sluice.conflist comes before 00-multus.conf, and Multus, which looks for the first
    configuration that is not its own, skips names that begin with 00-multus (findMasterPlugin).
    """
    return wished if behind < wished < first else first.rpartition(".")[0] + "-sluice.conflist"


def kept_name(name: str) -> str:
    """Returns the name under which the original bytes of a file are kept.

    Runtimes decide by the extension alone: they read hidden files too.
    """
    return ORIGINAL + name + KEPT


def readable(names: Iterable[str]) -> list[str]:
    """Returns the names that a runtime reads, in its order. As in Go's filepath.Ext, ".conf" alone is an extension."""
    return sorted(name for name in names if name.endswith(EXTENSIONS))


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns True if two networks are equal, the order of keys included."""
    return json.dumps(one) == json.dumps(other)


def encode(network: Json) -> bytes:
    """Returns the network as Sluice writes it."""
    return json.dumps(network, indent=2).encode() + b"\n"


def istio_entry(conf: Conf) -> Json:
    """Returns istio-cni's entry; {} for none."""
    return next((one for one in conf.plugins if one["type"] == ISTIO), {})


def istio_form(conf: Conf, every: Sequence[Conf]) -> str:
    """Returns CHAINED, OWNED or ALONE for a configuration with istio-cni's entry.

    `every`: all configurations of the directory except our own lists.
    """
    rest = [kind for kind in _types(conf) if kind != ISTIO]  # without our entry, which may have been inserted
    if not rest:
        return ALONE
    others = [other for other in every if other is not conf and not mentions(other.network, ISTIO)]
    wraps = any(_types(other) == rest for other in others)
    return OWNED if wraps or (others and ISTIO in conf.name) else CHAINED


def istio_owned(every: Sequence[Conf]) -> list[Conf]:
    """Returns the lists that istio-cni made around another one; its agent keeps them in front of all others."""
    return [conf for conf in every if istio_entry(conf) and istio_form(conf, every) == OWNED]


def _types(conf: Conf) -> list[str]:
    return [one["type"] for one in conf.plugins if one["type"] != CNI_TYPE]

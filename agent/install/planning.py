# SPDX-License-Identifier: Apache-2.0
"""The plan for a runtime's directory of configurations, as a value: empty when the directory is right. Pure.

Each action is one atomic change, and after each of them the first list in the directory works.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace

from agent.core.errors import SettingsError
from agent.core.names import CNI_TYPE
from agent.install import conflists
from agent.install.conflists import ISTIO, MIGRATED, ORIGINAL, Conf, Json, kept_name


@dataclass(frozen=True, slots=True)
class View:
    """The directory as it was read: contents by file name, and for each unreadable file the reason."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Write:
    """Writes the file; `like`: a new one gets the mode of that file, otherwise only root may read it."""

    name: str
    data: bytes
    like: str = ""

    def __str__(self) -> str:
        return f"write {self.name} ({len(self.data)} bytes)"


@dataclass(frozen=True, slots=True)
class Rename:
    name: str
    to: str

    def __str__(self) -> str:
        return f"rename {self.name} to {self.to}"


@dataclass(frozen=True, slots=True)
class Remove:
    name: str

    def __str__(self) -> str:
        return f"remove {self.name}"


Action = Write | Rename | Remove


def after(view: View, actions: Iterable[Action]) -> View:
    """Returns the directory as it is after the actions."""
    files = dict(view.files)
    for action in actions:
        match action:
            case Write(name, data, _):
                files[name] = data
            case Rename(name, to):
                files[to] = files.pop(name)
            case Remove(name):
                files.pop(name, None)
    return replace(view, files=files)


@dataclass(frozen=True, slots=True)
class InstallPlan:
    """A plan. After `actions`, `file` has our entry, made from `primary`; both are "" while there is no primary list.

    `error` says why that is impossible or out of date; `remarks` are for the operator.
    """

    actions: tuple[Action, ...] = ()
    _: KW_ONLY
    file: str = ""
    primary: str = ""
    error: str = ""
    remarks: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        return bool(self.file) and not self.actions and not self.error


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The directory's configurations by kind, each kind in the runtime's order."""

    own: tuple[Conf, ...]  # made by Sluice around another list
    inserted: tuple[Conf, ...]  # made by another program, with our entry inserted by Sluice
    copies: tuple[Conf, ...]  # made by another program from one of those
    others: tuple[Conf, ...]
    bad: Mapping[str, str]

    @property
    def foreign(self) -> list[Conf]:
        return sorted((*self.inserted, *self.copies, *self.others), key=lambda conf: conf.name)

    @property
    def of_istio(self) -> list[Conf]:
        """The lists of istio-cni.

        Its agent rewrites its list as long as another one comes first, so Sluice's follows it and takes over when it
        is removed.
        """
        return conflists.istio_owned(self.foreign)

    @property
    def later(self) -> list[Conf]:
        """All other lists, which ours must precede."""
        istio = self.of_istio
        return [conf for conf in self.foreign if conf not in istio]


def sort(view: View, wished: str) -> Sorted:
    """Sorts the files by kind. A damaged file under the name of our list is in no group: it is written again."""
    groups: dict[str, list[Conf]] = {"own": [], "inserted": [], "copies": [], "others": []}
    bad = {name: f"{name}: {why}" for name, why in view.unread.items()}
    for name in conflists.readable(view.files):
        try:
            conf = conflists.parse(name, view.files[name])
        except SettingsError as error:
            bad[name] = str(error)
            continue
        if conflists.stripped(conf.plugins):
            groups[_group(conf, wished)].append(conf)
        else:
            bad[name] = f"{name}: it has no plugin except {CNI_TYPE}"
    bad.pop(wished, None)
    own, inserted, copies, others = map(tuple, groups.values())
    return Sorted(own=own, inserted=inserted, copies=copies, others=others, bad=bad)


def _group(conf: Conf, wished: str) -> str:
    if conflists.is_own(conf) or conf.name == wished:  # that name is ours, even if another program used it
        return "own"
    if conflists.is_inserted(conf):
        return "inserted"
    return "copies" if conf.entry else "others"


def own(view: View, entry: Json, wished: str) -> InstallPlan:
    """Plans our own list around the primary one: the first list that a runtime would use without ours."""
    ordered = sort(view, wished)
    candidates = [conf for conf in ordered.later if conf not in ordered.copies] or list(ordered.copies)
    current = next((conf for conf in ordered.own if conflists.is_own(conf)), None)
    if current and (not candidates or current.wraps in ordered.bad):
        why = ordered.bad.get(current.wraps, "")
        gone = "" if why else f"{current.wraps} is missing; {current.name}, made from it, is kept"
        return _refreshed(current, entry, why, gone)
    if not candidates:
        return InstallPlan(error="; ".join(ordered.bad.values()) or "no CNI configuration found yet")
    primary = candidates[0]
    if why := conflists.chainable(primary):
        return InstallPlan(error=why, primary=primary.name, file=current.name if current else "")
    first = ordered.later[0].name
    behind = max((conf.name for conf in ordered.of_istio if conf.name < first), default="")
    file = conflists.own_name(wished, first, behind)
    actions = [*_write(view, file, conflists.wrap(primary, entry, file))]
    actions += [Remove(conf.name) for conf in ordered.own if conf.name != file]
    for conf in ordered.inserted:
        actions += _restored(view, conf)
    return InstallPlan(
        tuple(actions), file=file, primary=primary.name, remarks=_remarks(ordered, primary, file, wished)
    )


def _refreshed(current: Conf, entry: Json, error: str, remark: str) -> InstallPlan:
    """Keeps our list and updates only the entry, which may be from an older agent."""
    data = conflists.rewrap(current, entry)
    actions = () if data == current.data else (Write(current.name, data),)
    return InstallPlan(
        actions, file=current.name, primary=current.wraps, error=error, remarks=(remark,) if remark else ()
    )


def insert(view: View, entry: Json, wished: str) -> InstallPlan:
    """Plans our entry in the primary's own file; its original bytes are kept under a name that no runtime reads."""
    ordered = sort(view, wished)
    if not ordered.foreign:
        return InstallPlan(error="; ".join(ordered.bad.values()) or "no CNI configuration found yet")
    primary = ordered.later[0]
    file = primary.stem + ".conflist"
    if why := conflists.chainable(primary):
        return InstallPlan(error=why, primary=primary.name)
    if file != primary.name and any(conf.name == file for conf in (*ordered.others, *ordered.copies)):
        why = f"{primary.name} must be renamed to {file}, which exists already"
        return InstallPlan(error=f"{why}; remove one of them, or use cni_install: own")
    actions: list[Action] = []
    data = conflists.insert(primary, entry, file)
    kept = kept_name(primary.name)
    if file != primary.name:
        actions = [*_write(view, file, data, like=primary.name), Rename(primary.name, kept)]
    elif data != primary.data:
        keeps = primary in ordered.inserted
        actions = [*(() if keeps else _write(view, kept, primary.data, like=file)), Write(file, data)]
    actions += [Remove(conf.name) for conf in ordered.own]
    for conf in ordered.inserted:
        actions += () if conf.name == file else _restored(view, conf)
    return InstallPlan(tuple(actions), file=file, primary=primary.name, remarks=_remarks(ordered, primary, file, file))


def removal(view: View, wished: str) -> InstallPlan:
    """Plans the removal of our entry from the directory, with the original bytes where these are still valid.

    Only `actions` and `remarks` of the plan count. If our list is the only one, it stays without our entry under the
    primary's name: pods must still start.
    """
    ordered = sort(view, wished)
    actions: list[Action] = []
    remarks: tuple[str, ...] = ()
    for conf in ordered.inserted:
        actions += _restored(view, conf)
    actions += [Write(conf.name, conflists.strip(conf)) for conf in ordered.copies if len(conf.plugins) > 1]
    mentioning = [conf for conf in ordered.others if conflists.mentions(conf.network)]  # among Multus' delegates
    actions += [Write(conf.name, _inside(conf)) for conf in mentioning]
    last = next(iter(ordered.own), None)
    name = _freed(last.wraps, wished) if last else ""
    if name in ordered.bad:  # half written or damaged: its owner may repair it, and then it comes first
        name = "99-primary.conflist"
    stays = bool(last) and not ordered.foreign
    if last and stays:
        actions.append(Write(name, conflists.strip(last), like=last.name))
        remarks = (f"{last.name} was the only configuration: its plugins stay in {name}, without {CNI_TYPE}",)
    actions += [Remove(conf.name) for conf in ordered.own if not (stays and conf.name == name)]
    if wished in view.files and all(conf.name != wished for conf in (*ordered.own, *ordered.foreign)):
        actions.append(Remove(wished))  # damaged
    gone = {one.name for one in actions if isinstance(one, Remove | Rename)}
    actions += [Remove(name) for name in sorted(view.files) if _left(name, wished) and name not in gone]
    return InstallPlan(tuple(actions), remarks=remarks)


def _freed(wraps: str, wished: str) -> str:
    """Returns a safe name from a file's text: inside the directory, visible to every runtime and not ours."""
    stem = wraps.rpartition(".")[0]
    name = stem + ".conflist"
    return "10-primary.conflist" if not stem or "/" in stem or stem.startswith(".") or name == wished else name


def _left(name: str, wished: str) -> bool:
    """Returns True for kept originals, those of `sluice migrate` too, and for files that Cilium renamed away."""
    return name.startswith((ORIGINAL, MIGRATED)) or name in (f"{wished}.cilium_bak", f"{wished}.cilium_backup")


def _inside(conf: Conf) -> bytes:
    network = conflists.stripped(conf.network)
    return conflists.encode(network["plugins"][0] if conf.single else network)


def _restored(view: View, conf: Conf) -> list[Action]:
    """Restores a file that our entry was inserted into: with the kept bytes if the list is the same today."""
    original = conflists.origin(conf)
    kept = kept_name(original)
    drop = [Remove(kept)] if kept in view.files else []
    try:
        before = conflists.parse(original, view.files.get(kept, b"")).network
        same = conflists.same(before, conflists.stripped(conf.network))
    except SettingsError:
        same = False
    if original != conf.name and original in view.files:  # the primary has restored its own file
        return [Remove(conf.name), *drop]
    if same:
        return [Rename(kept, original), *([Remove(conf.name)] if original != conf.name else [])]
    return [Write(conf.name, conflists.strip(conf)), *drop]


def _write(view: View, name: str, data: bytes, like: str = "") -> tuple[Action, ...]:
    return () if view.files.get(name) == data else (Write(name, data, like),)


def _remarks(ordered: Sorted, primary: Conf, file: str, wished: str) -> tuple[str, ...]:
    remarks = []
    if file != wished:
        remarks.append(f"{wished} would not sort before {ordered.later[0].name}: {file} is used")
    if any(plugin["type"] == ISTIO for plugin in primary.plugins):
        remarks.append(f"{primary.name} also chains istio-cni, which is kept: two agents (see sluice migrate --check)")
    istio = ordered.of_istio
    remarks += [f"{conf.name} is {ISTIO}'s own and stays first; ours follows (see sluice migrate)" for conf in istio]
    copies = [conf.name for conf in ordered.copies if conf not in istio]
    remarks += [f"{name} is another program's copy of Sluice's list: not wrapped" for name in copies]
    remarks += [f"not used: {why}" for name, why in ordered.bad.items() if name < file]
    return tuple(remarks)

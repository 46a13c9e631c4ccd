# SPDX-License-Identifier: Apache-2.0
"""The steps that take a node over from istio-cni and hand it back, each one atomic change to a file. Pure.

Before, between and after the steps the list that a runtime uses has an entry of istio-cni or of Sluice: an enrolled pod
is captured by one of the two, or its ADD is refused. The remaining steps are planned from the directory as it is, so
after an interruption the same command continues.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.core.errors import SettingsError
from agent.install import conflists, planning
from agent.install.conflists import CHAINED, ISTIO, Conf, Json, istio_entry
from agent.install.planning import Action, Remove, Rename, View, Write
from agent.migration import istio_confs
from agent.migration.istio_confs import ENTRY, FILE, KEPT, IstioConf


@dataclass(frozen=True, slots=True)
class MigrationStep:
    action: Action
    why: str

    def __str__(self) -> str:
        return f"{self.action}  # {self.why}"


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps in order, none when all is done. `error`: why they do not complete the task, and what to do then."""

    steps: tuple[MigrationStep, ...] = ()
    error: str = ""
    remarks: tuple[str, ...] = ()


def take_over(view: View, entry: Json, wished: str, *, mode: str = "own", aside: bool = True) -> Steps:
    """Plans a take-over: our list comes first, around the existing ones; then, if `aside`, istio-cni's is removed.

    `mode` is own or insert: the final form of our entry.
    """
    last = planning.insert if mode == "insert" else planning.own
    confs = istio_confs.mentioning(view)
    first = planning.own if confs and aside else last
    verdict = first(view, entry, wished)
    if verdict.error:
        return Steps(error=verdict.error, remarks=verdict.remarks)
    why = "Sluice's entry first, next to istio-cni's" if confs else "Sluice's entry"
    steps = [MigrationStep(action, why) for action in verdict.actions]
    if not confs or not aside:
        return Steps(tuple(steps), remarks=verdict.remarks)
    for conf in istio_confs.mentioning(after(view, steps)):
        steps += _aside(after(view, steps), conf)
    verdict = last(after(view, steps), entry, wished)
    steps += [MigrationStep(action, "Sluice's entry without istio-cni's") for action in verdict.actions]
    if verdict.error:
        return Steps(tuple(steps), verdict.error, verdict.remarks)
    return Steps(tuple(steps), _unfinished(after(view, steps)), verdict.remarks)


def _unfinished(view: View) -> str:
    picked = istio_confs.picked(view)
    if picked is None or not conflists.mentions(picked.network) or conflists.mentions(picked.network, ISTIO):
        name = picked.name if picked else "nothing"
        return f"cannot remove istio-cni: only {name} would remain; is there a primary CNI plugin?"
    return ""


def _aside(view: View, istio: IstioConf) -> list[MigrationStep]:
    name = istio.conf.name
    if istio.form != CHAINED:
        return [MigrationStep(Rename(name, FILE + name + KEPT), f"keep istio-cni's own file ({istio.form})")]
    kept = ENTRY + name + KEPT
    data = istio.conf.data
    network = conflists.stripped(istio.conf.network, ISTIO)
    clean = conflists.encode(network["plugins"][0] if istio.conf.single else network)
    keep = (
        () if view.files.get(kept) == data else (MigrationStep(Write(kept, data, like=name), f"{name} as it is now"),)
    )
    return [*keep, MigrationStep(Write(name, clean), "remove istio-cni's entry from the primary's list")]


def back(view: View, wished: str) -> Steps:
    """Plans a hand-back: istio-cni's files as they were or as they would be today; then ours are removed."""
    steps: list[MigrationStep] = []
    for kept, kind, name in istio_confs.other_entries(view):
        steps += _restored(after(view, steps), kept, kind, name)
    steps += _moved(after(view, steps))
    verdict = planning.removal(after(view, steps), wished)
    steps += [MigrationStep(action, "remove Sluice's entry") for action in verdict.actions]
    picked = istio_confs.picked(after(view, steps))
    if picked is None or not conflists.mentions(picked.network, ISTIO):
        name = picked.name if picked else "no configuration"
        consequence = f"then {name} would be used without istio-cni's entry: its pods would start uncaptured"
        return Steps(
            error=f"{consequence}; install istio-cni first, so that its agent writes the entry, then run this again"
        )
    return Steps(tuple(steps), remarks=verdict.remarks)


def until_istio_cni(view: View, entry: Json, wished: str) -> Steps:
    """Plans our entry in the primary's list, which refuses enrolled pods until istio-cni has added its own.

    istio-cni's agent uses the first list that it finds as the primary one as long as it runs, and waits for that file
    if it is removed. So no list of Sluice may exist when it starts.
    """
    verdict = planning.insert(view, entry, wished)
    why = "Sluice's entry refuses enrolled pods until istio-cni is installed"
    return Steps(tuple(MigrationStep(action, why) for action in verdict.actions), remarks=verdict.remarks)


def taken(view: View) -> str:
    """Returns the list of Sluice that istio-cni's agent uses as the primary one; "" for none."""
    entries = (conf.entry for conf in istio_confs.confs(view) if _added(conf))
    return next((str(entry["file"]) for entry in entries if entry and "wraps" in entry), "")


def _added(conf: Conf) -> Json:
    """Returns istio-cni's entry if its agent added it behind ours; an entry that we wrap comes before ours."""
    return istio_entry(conf) if conf.entry and conf.plugins[-1]["type"] == ISTIO else {}


def _moved(view: View) -> list[MigrationStep]:
    """Moves an entry that istio-cni's agent added to our list into the primary's list: ours is removed next."""
    confs = istio_confs.confs(view)
    entry = next((added for conf in confs if conflists.is_own(conf) and (added := _added(conf))), {})
    primary = next((conf for conf in confs if not conflists.is_own(conf)), None)
    if not entry or primary is None or conflists.mentions(primary.network, ISTIO):
        return []
    data = conflists.encode(istio_confs.added(primary.network, entry))
    name = f"{primary.stem}.conflist"
    steps = [
        MigrationStep(
            Write(name, data, like=primary.name), "move istio-cni's entry from Sluice's list to the primary's"
        )
    ]
    return (
        steps
        if name == primary.name
        else [*steps, MigrationStep(Remove(primary.name), "replaced by a list, as istio-cni does")]
    )


def _restored(view: View, kept: str, kind: str, name: str) -> list[MigrationStep]:
    done = MigrationStep(Remove(kept), "no longer needed")
    there = {conf.name: conf for conf in istio_confs.confs(view) if not conflists.is_own(conf)}
    try:
        old = conflists.parse(name, view.files[kept])
    except SettingsError:
        return [done]
    if name in there and conflists.mentions(there[name].network, ISTIO):
        return [done]  # its agent has restored it
    primary = there.get(name) or next(iter(there.values()), None)
    rest = conflists.stripped(old.network, ISTIO)
    if primary is None or not rest["plugins"] or (_says(primary, rest) and (kind == FILE or _stem(name, primary))):
        return [MigrationStep(Rename(kept, name), "istio-cni's entry as it was")]
    entry = istio_entry(old)
    if not entry or primary.single or conflists.mentions(primary.network, ISTIO):
        return [done]
    target, network = (name, conflists.stripped(primary.network)) if kind == FILE else (primary.name, primary.network)
    data = conflists.encode(istio_confs.added(network, entry))
    return [MigrationStep(Write(target, data, like=primary.name), "istio-cni's entry after today's plugins"), done]


def _stem(name: str, conf: Conf) -> bool:
    """Returns True if the file is the same, except for an extension that our insertion may have changed."""
    return name.rpartition(".")[0] == conf.stem


def _says(primary: Conf, rest: Json) -> bool:
    """Returns True if the plugins are those with which istio-cni's entry was kept."""
    return bool(conflists.stripped(primary.network)["plugins"] == conflists.stripped(rest)["plugins"])


def after(view: View, steps: Iterable[MigrationStep]) -> View:
    """Returns the directory as it is after the steps."""
    return planning.after(view, (step.action for step in steps))

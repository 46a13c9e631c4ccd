# SPDX-License-Identifier: Apache-2.0
"""Assesses a node's facts: obstacles and notes for the operator, each with what to do. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from agent.core.settings import Settings
from agent.install.conflists import ISTIO, Json
from agent.migration import istio_confs, values
from agent.migration.equivalents import Translated, differences, translate
from agent.migration.migration_facts import ISTIO_CNI, SIDECAR, SLUICE, MigrationFacts
from agent.migration.steps import back, take_over, taken

FINE, NOTE, OBSTACLE, ACCEPTED = "fine", "note", "obstacle", "accepted"
LEFT = "left"  # subject of what the take-over has not changed yet


@dataclass(frozen=True, slots=True)
class MigrationFinding:
    """One finding. `subject` is the name for --accept; `todo` is "" if nothing must be done."""

    subject: str
    level: str
    words: str
    todo: str = ""


def accepted(findings: Collection[MigrationFinding], subjects: Collection[str]) -> tuple[MigrationFinding, ...]:
    """Marks the obstacles that the operator accepted by `subjects`."""
    return tuple(
        replace(one, level=ACCEPTED) if one.level == OBSTACLE and one.subject in subjects else one for one in findings
    )


def take_over_findings(facts: MigrationFacts, entry: Json, here: Settings, mode: str) -> tuple[MigrationFinding, ...]:
    """Returns the findings on a take-over of the node; an obstacle prevents it."""
    return (
        *_configuration(facts, entry, here, mode),
        *_agents(facts),
        *_binary(facts),
        *_pods(facts),
        *_settings(facts, here),
    )


def back_findings(facts: MigrationFacts, wished: str) -> tuple[MigrationFinding, ...]:
    """Returns the findings on handing the node back. The pods are first; after them a note keeps our entry in place."""
    found = [_problem(words) for words in facts.problems]
    if not facts.ours:
        words = "the Sluice agent runs and would reinstall everything"
        found.append(
            MigrationFinding("agent", OBSTACLE, words, "remove its DaemonSet from this node, then run this again")
        )
    steps = back(facts.view, wished)
    todo = "install istio-cni again, then run this again"
    if not facts.binary:
        words = f"{facts.plugins}/{ISTIO} is missing: with istio-cni's entry no pod could start or end"
        found.append(MigrationFinding("binary", NOTE, words, todo))
    elif steps.error:
        found.append(MigrationFinding("configuration", NOTE, steps.error, todo))
    else:
        words = f"{facts.directory} has no entry of Sluice"
        if steps.steps:
            words = f"{len(steps.steps)} steps to do in {facts.directory}"
        found.append(MigrationFinding("configuration", FINE, words))
    return tuple(found)


def leftovers_of_back(before: MigrationFacts, facts: MigrationFacts) -> tuple[MigrationFinding, ...]:
    """Returns what the hand-back has not reached, from facts read after it."""
    found = []
    if facts.host == SLUICE:
        words = "the exemption of the node's probes is still Sluice's: istio-cni cannot install its own over it"
        found.append(MigrationFinding("host", OBSTACLE, words, "see sluice handback --all"))
    if facts.agent and (name := taken(before.view)) and name not in facts.view.files:
        words = f"istio-cni's agent uses {name} as the primary list; it is removed, and the agent waits for it"
        pods = "-n istio-system -l k8s-app=istio-cni-node --field-selector spec.nodeName=NODE"
        found.append(MigrationFinding(LEFT, NOTE, words, f"restart it: kubectl delete pod {pods}"))
    return tuple(found)


def leftovers(facts: MigrationFacts) -> tuple[MigrationFinding, ...]:
    """Returns what the take-over has not reached, from facts read after it."""
    found = []
    if istio_confs.places(facts.view):
        words = "istio-cni's entry is still in place: its agent runs and would restore it"
        found.append(MigrationFinding(LEFT, NOTE, words, "remove its DaemonSet from this node, then run this again"))
    if theirs := facts.by(ISTIO_CNI):
        words = f"{len(theirs)} pods still have istio-cni's rules; the Sluice agent adopts the pods that it knows"
        found.append(MigrationFinding(LEFT, NOTE, words, "see sluice pods, and run this again"))
    if facts.ztunnels == 0 and not facts.agent:
        words = "no ztunnel has connected to the Sluice agent"
        if facts.socket:
            found.append(MigrationFinding(LEFT, NOTE, words, "check that ztunnel runs, then run this again"))
        else:
            # Go's net.ListenUnix removes its path at the end, even if another process has a socket there by then.
            words += ": istio-cni's agent removed the socket's file when it ended"
            todo = "restart the Sluice agent on this node, then run this again"
            found.append(MigrationFinding(LEFT, NOTE, words, todo))
    return tuple(found)


def _problem(words: str) -> MigrationFinding:
    return MigrationFinding(
        "unseen", OBSTACLE, f"cannot inspect: {words}", "run it as root, in the node's PID namespace"
    )


def _configuration(facts: MigrationFacts, entry: Json, here: Settings, mode: str) -> Iterator[MigrationFinding]:
    places = istio_confs.places(facts.view)
    for place in places:
        if not place.entry:
            words = f"{place.conf.name} has istio-cni among its delegates; Multus may write it again"
            yield MigrationFinding("configuration", NOTE, words, "restart Multus on this node afterwards")
            continue
        yield MigrationFinding(
            "configuration", FINE, f"istio-cni is in {facts.directory}/{place.conf.name} ({place.form})"
        )
        if place.entry.get("ambient_enabled") is False:
            words = f"{place.conf.name}: ambient mode is off; istio-cni programs sidecars, which Sluice does not"
            yield MigrationFinding("sidecars", OBSTACLE, words, "keep istio-cni on this node")
    if not places:
        yield MigrationFinding("configuration", FINE, f"no configuration in {facts.directory} contains istio-cni")
    steps = take_over(facts.view, entry, here.cni_conf_name, mode=mode)
    if steps.error:
        yield MigrationFinding(
            "configuration", OBSTACLE, steps.error, f"correct {facts.directory}, or set cni_conf_dir"
        )
    for words in steps.remarks:
        if ISTIO not in words:
            yield MigrationFinding("configuration", NOTE, words)


def _agents(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    if facts.agent:
        words = f"its agent runs ({facts.agent}): Sluice's entry comes first now, the rest when that agent is gone"
        todo = "remove its DaemonSet from this node when the Sluice agent runs; see docs/migrating.md"
        yield MigrationFinding("istio-cni", NOTE, words, todo)
    else:
        yield MigrationFinding("istio-cni", FINE, "its agent does not run")
    if facts.ours:
        words = f"the Sluice agent does not run: {facts.ours}"
        yield MigrationFinding(
            "agent", OBSTACLE, words, "install Sluice on this node first: enrolled pods could not start"
        )
    else:
        yield MigrationFinding("agent", FINE, "the Sluice agent runs")


def _binary(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    place = f"{facts.plugins}/{ISTIO}"
    named = bool(istio_confs.places(facts.view))
    if facts.binary:
        words = f"{place} stays, for pods that were started with it" if facts.cached else f"{place} is there"
        yield MigrationFinding("binary", NOTE if facts.cached else FINE, words)
    elif facts.cached:
        words = f"{place} is missing, and this runtime deletes {facts.cached} pods with it"
        yield MigrationFinding("binary", OBSTACLE, words, "put it back until those pods have ended, or reboot the node")
    elif named:
        words = f"{place} is missing: no pod can start until istio-cni's entry is removed"
        yield MigrationFinding("binary", NOTE, words)


def _pods(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    yield from map(_problem, facts.problems)
    theirs, ours, sidecars = (facts.by(owner) for owner in (ISTIO_CNI, SLUICE, SIDECAR))
    yield MigrationFinding("pods", FINE, f"{len(theirs)} captured by istio-cni, {len(ours)} by Sluice")
    if facts.host:
        yield MigrationFinding("host", FINE, f"the node's probes are exempted by {facts.host}")
    if sidecars:
        words = f"{len(sidecars)} pods have the rules of a sidecar, which Sluice does not install: {_named(sidecars)}"
        todo = (
            "let istio-init install them (pilot.cni.enabled=false) and restart those pods;"
            " if it already does: --accept sidecars"
        )
        yield MigrationFinding("sidecars", OBSTACLE, words, todo)


def _named(found: Collection[object]) -> str:
    names = [getattr(one, "pod", "") or getattr(one, "netns", "") for one in found]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _settings(facts: MigrationFacts, here: Settings) -> Iterator[MigrationFinding]:
    translated = translated_of(facts)
    for line in differences(translated, here):
        todo = "set it as istio-cni has it, or --accept settings if the change is intended"
        yield MigrationFinding("settings", OBSTACLE, f"istio-cni has {line}", todo)
    for words in translated.remarks:
        yield MigrationFinding("settings", NOTE, words)


def translated_of(facts: MigrationFacts) -> Translated:
    """Translates the settings that the operator gave, or else those of istio-cni's entries.

    Leaves out directories that the agent finds without a setting.
    """
    found = dict(facts.settings)
    if not found:
        for place in istio_confs.places(facts.view):
            found |= values.of_entry(place.entry)
    there = {"cni_conf_dir": facts.directory, "cni_bin_dir": facts.plugins}
    translated = translate(found)
    needed = {key: value for key, value in translated.settings.items() if str(value).rstrip("/") != there.get(key)}
    return replace(translated, settings=needed)

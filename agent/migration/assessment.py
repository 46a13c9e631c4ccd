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
    findings = [_problem(observation) for observation in facts.problems]
    if not facts.ours:
        observation = "the Sluice agent runs and would reinstall everything"
        findings.append(
            MigrationFinding("agent", OBSTACLE, observation, "remove its DaemonSet from this node, then run this again")
        )
    steps = back(facts.view, wished)
    todo = "install istio-cni again, then run this again"
    if not facts.binary:
        observation = f"{facts.plugins}/{ISTIO} is missing: with istio-cni's entry no pod could start or end"
        findings.append(MigrationFinding("binary", NOTE, observation, todo))
    elif steps.error:
        findings.append(MigrationFinding("configuration", NOTE, steps.error, todo))
    else:
        observation = f"{facts.directory} has no entry of Sluice"
        if steps.steps:
            observation = f"{len(steps.steps)} steps to do in {facts.directory}"
        findings.append(MigrationFinding("configuration", FINE, observation))
    return tuple(findings)


def leftovers_of_back(before: MigrationFacts, facts: MigrationFacts) -> tuple[MigrationFinding, ...]:
    """Returns what the hand-back has not reached, from facts read after it."""
    findings = []
    if facts.host == SLUICE:
        observation = "the exemption of the node's probes is still Sluice's: istio-cni cannot install its own over it"
        findings.append(MigrationFinding("host", OBSTACLE, observation, "see sluice handback --all"))
    if facts.agent and (name := taken(before.view)) and name not in facts.view.files:
        observation = f"istio-cni's agent uses {name} as the primary list; it is removed, and the agent waits for it"
        pods = "-n istio-system -l k8s-app=istio-cni-node --field-selector spec.nodeName=NODE"
        findings.append(MigrationFinding(LEFT, NOTE, observation, f"restart it: kubectl delete pod {pods}"))
    return tuple(findings)


def leftovers(facts: MigrationFacts) -> tuple[MigrationFinding, ...]:
    """Returns what the take-over has not reached, from facts read after it."""
    findings = []
    if istio_confs.mentioning(facts.view):
        observation = "istio-cni's entry is still in place: its agent runs and would restore it"
        findings.append(
            MigrationFinding(LEFT, NOTE, observation, "remove its DaemonSet from this node, then run this again")
        )
    if of_istio := facts.by(ISTIO_CNI):
        observation = (
            f"{len(of_istio)} pods still have istio-cni's rules; the Sluice agent adopts the pods that it knows"
        )
        findings.append(MigrationFinding(LEFT, NOTE, observation, "see sluice pods, and run this again"))
    if facts.ztunnels == 0 and not facts.agent:
        observation = "no ztunnel has connected to the Sluice agent"
        if facts.socket:
            findings.append(MigrationFinding(LEFT, NOTE, observation, "check that ztunnel runs, then run this again"))
        else:
            # Go's net.ListenUnix removes its path at the end, even if another process has a socket there by then.
            observation += ": istio-cni's agent removed the socket's file when it ended"
            todo = "restart the Sluice agent on this node, then run this again"
            findings.append(MigrationFinding(LEFT, NOTE, observation, todo))
    return tuple(findings)


def _problem(problem: str) -> MigrationFinding:
    return MigrationFinding(
        "unseen", OBSTACLE, f"cannot inspect: {problem}", "run it as root, in the node's PID namespace"
    )


def _configuration(facts: MigrationFacts, entry: Json, here: Settings, mode: str) -> Iterator[MigrationFinding]:
    confs = istio_confs.mentioning(facts.view)
    for conf in confs:
        if not conf.entry:
            observation = f"{conf.conf.name} has istio-cni among its delegates; Multus may write it again"
            yield MigrationFinding("configuration", NOTE, observation, "restart Multus on this node afterwards")
            continue
        yield MigrationFinding(
            "configuration", FINE, f"istio-cni is in {facts.directory}/{conf.conf.name} ({conf.form})"
        )
        if conf.entry.get("ambient_enabled") is False:
            observation = f"{conf.conf.name}: ambient mode is off; istio-cni programs sidecars, which Sluice does not"
            yield MigrationFinding("sidecars", OBSTACLE, observation, "keep istio-cni on this node")
    if not confs:
        yield MigrationFinding("configuration", FINE, f"no configuration in {facts.directory} contains istio-cni")
    steps = take_over(facts.view, entry, here.cni_conf_name, mode=mode)
    if steps.error:
        yield MigrationFinding(
            "configuration", OBSTACLE, steps.error, f"correct {facts.directory}, or set cni_conf_dir"
        )
    for observation in steps.remarks:
        if ISTIO not in observation:
            yield MigrationFinding("configuration", NOTE, observation)


def _agents(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    if facts.agent:
        observation = (
            f"its agent runs ({facts.agent}): Sluice's entry comes first now, the rest when that agent is gone"
        )
        todo = "remove its DaemonSet from this node when the Sluice agent runs; see docs/migrating.md"
        yield MigrationFinding("istio-cni", NOTE, observation, todo)
    else:
        yield MigrationFinding("istio-cni", FINE, "its agent does not run")
    if facts.ours:
        observation = f"the Sluice agent does not run: {facts.ours}"
        yield MigrationFinding(
            "agent", OBSTACLE, observation, "install Sluice on this node first: enrolled pods could not start"
        )
    else:
        yield MigrationFinding("agent", FINE, "the Sluice agent runs")


def _binary(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    path = f"{facts.plugins}/{ISTIO}"
    named = bool(istio_confs.mentioning(facts.view))
    if facts.binary:
        observation = f"{path} stays, for pods that were started with it" if facts.cached else f"{path} is there"
        yield MigrationFinding("binary", NOTE if facts.cached else FINE, observation)
    elif facts.cached:
        observation = f"{path} is missing, and this runtime deletes {facts.cached} pods with it"
        yield MigrationFinding(
            "binary", OBSTACLE, observation, "put it back until those pods have ended, or reboot the node"
        )
    elif named:
        observation = f"{path} is missing: no pod can start until istio-cni's entry is removed"
        yield MigrationFinding("binary", NOTE, observation)


def _pods(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    yield from map(_problem, facts.problems)
    of_istio, of_sluice, sidecars = (facts.by(owner) for owner in (ISTIO_CNI, SLUICE, SIDECAR))
    yield MigrationFinding("pods", FINE, f"{len(of_istio)} captured by istio-cni, {len(of_sluice)} by Sluice")
    if facts.host:
        yield MigrationFinding("host", FINE, f"the node's probes are exempted by {facts.host}")
    if sidecars:
        observation = (
            f"{len(sidecars)} pods have the rules of a sidecar, which Sluice does not install: {_named(sidecars)}"
        )
        todo = (
            "let istio-init install them (pilot.cni.enabled=false) and restart those pods;"
            " if it already does: --accept sidecars"
        )
        yield MigrationFinding("sidecars", OBSTACLE, observation, todo)


def _named(pods: Collection[object]) -> str:
    names = [getattr(one, "pod", "") or getattr(one, "netns", "") for one in pods]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _settings(facts: MigrationFacts, here: Settings) -> Iterator[MigrationFinding]:
    translated = translated_of(facts)
    for line in differences(translated, here):
        todo = "set it as istio-cni has it, or --accept settings if the change is intended"
        yield MigrationFinding("settings", OBSTACLE, f"istio-cni has {line}", todo)
    for remark in translated.remarks:
        yield MigrationFinding("settings", NOTE, remark)


def translated_of(facts: MigrationFacts) -> Translated:
    """Translates the settings that the operator gave, or else those of istio-cni's entries.

    Leaves out directories that the agent finds without a setting.
    """
    values_of_istio = dict(facts.settings)
    if not values_of_istio:
        for conf in istio_confs.mentioning(facts.view):
            values_of_istio |= values.of_entry(conf.entry)
    there = {"cni_conf_dir": facts.directory, "cni_bin_dir": facts.plugins}
    translated = translate(values_of_istio)
    needed = {key: value for key, value in translated.settings.items() if str(value).rstrip("/") != there.get(key)}
    return replace(translated, settings=needed)

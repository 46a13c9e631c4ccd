"""From a node's facts to findings: what is in the way, what a person should know, each with what to do. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from agent.core.settings import Settings
from agent.install.conflists import ISTIO, Json
from agent.migration import istio, values
from agent.migration.equivalents import Translated, differences, translate
from agent.migration.facts import ISTIO_CNI, SIDECAR, SLUICE, MigrationFacts
from agent.migration.steps import back, take_over, taken

FINE, NOTE, OBSTACLE, ACCEPTED = "fine", "note", "obstacle", "accepted"
LEFT = "left"  # subject of what take-over has not reached yet


@dataclass(frozen=True, slots=True)
class MigrationFinding:
    """`subject` is what --accept names. `todo` is "" where nothing has to be done."""

    subject: str
    level: str
    words: str
    todo: str = ""


def accepted(findings: Collection[MigrationFinding], subjects: Collection[str]) -> tuple[MigrationFinding, ...]:
    """Obstacles that a person has accepted are none."""
    return tuple(
        replace(one, level=ACCEPTED) if one.level == OBSTACLE and one.subject in subjects else one for one in findings
    )


def take_over_findings(facts: MigrationFacts, entry: Json, here: Settings, mode: str) -> tuple[MigrationFinding, ...]:
    """Whether the node can be taken over."""
    return (
        *_configuration(facts, entry, here, mode),
        *_agents(facts),
        *_binary(facts),
        *_pods(facts),
        *_settings(facts, here),
    )


def back_findings(facts: MigrationFacts, wished: str) -> tuple[MigrationFinding, ...]:
    """Whether the node can be handed back. Pods come first; what is a note then keeps our entry in place."""
    found = [_problem(words) for words in facts.problems]
    if not facts.ours:
        words = "our agent runs and would put everything back"
        found.append(
            MigrationFinding("agent", OBSTACLE, words, "take its DaemonSet from this node, then run this again")
        )
    steps = back(facts.view, wished)
    todo = "install istio-cni again, then run this again"
    if not facts.binary:
        words = f"{facts.plugins}/{ISTIO} is not there: with an entry of it no pod could start or end"
        found.append(MigrationFinding("binary", NOTE, words, todo))
    elif steps.error:
        found.append(MigrationFinding("configuration", NOTE, steps.error, todo))
    else:
        words = f"{len(steps.steps)} steps to do in {facts.directory}" if steps.steps else "it holds nothing of Sluice"
        found.append(MigrationFinding("configuration", FINE, words))
    return tuple(found)


def leftovers_of_back(before: MigrationFacts, facts: MigrationFacts) -> tuple[MigrationFinding, ...]:
    """What is not given back yet, looked at after it."""
    found = []
    if facts.host == SLUICE:
        words = "the exemption of the node's probes is ours still: istio-cni cannot make its own over it"
        found.append(MigrationFinding("host", OBSTACLE, words, "see sluice handback --all"))
    if facts.agent and (name := taken(before.view)) and name not in facts.view.files:
        words = f"istio-cni's agent took {name} for the primary list, and waits for it now that it has gone"
        pods = "-n istio-system -l k8s-app=istio-cni-node --field-selector spec.nodeName=NODE"
        found.append(MigrationFinding(LEFT, NOTE, words, f"restart it: kubectl delete pod {pods}"))
    return tuple(found)


def leftovers(facts: MigrationFacts) -> tuple[MigrationFinding, ...]:
    """What take-over has not reached yet, looked at after it."""
    found = []
    if istio.places(facts.view):
        words = "istio-cni's entry is still there: its agent runs, and would put it back"
        found.append(MigrationFinding(LEFT, NOTE, words, "take its DaemonSet from this node, then run this again"))
    if theirs := facts.by(ISTIO_CNI):
        words = f"{len(theirs)} pods are programmed by istio-cni still; our agent adopts those that it knows"
        found.append(MigrationFinding(LEFT, NOTE, words, "see sluice pods, and run this again"))
    if facts.ztunnels == 0 and not facts.agent:
        words = "no ztunnel has connected to our agent"
        if facts.socket:
            found.append(MigrationFinding(LEFT, NOTE, words, "see whether ztunnel runs, and run this again"))
        else:
            # Go's net.ListenUnix removes its path at the end, whoever's socket is there by then.
            gone = f"{words}: istio-cni's agent took the socket's file with it"
            found.append(MigrationFinding(LEFT, NOTE, gone, "restart our agent on this node, then run this again"))
    return tuple(found)


def _problem(words: str) -> MigrationFinding:
    return MigrationFinding(
        "unseen", OBSTACLE, f"could not look: {words}", "run it as root, in the node's PID namespace"
    )


def _configuration(facts: MigrationFacts, entry: Json, here: Settings, mode: str) -> Iterator[MigrationFinding]:
    places = istio.places(facts.view)
    for place in places:
        if not place.entry:
            words = f"{place.conf.name} has it among what it delegates to; Multus may write that again"
            yield MigrationFinding("configuration", NOTE, words, "restart Multus on this node afterwards")
            continue
        yield MigrationFinding(
            "configuration", FINE, f"istio-cni stands in {facts.directory}/{place.conf.name} ({place.form})"
        )
        if place.entry.get("ambient_enabled") is False:
            words = f"{place.conf.name}: its ambient mode is off; it programs sidecars, which we do not"
            yield MigrationFinding("sidecars", OBSTACLE, words, "keep istio-cni on this node")
    if not places:
        yield MigrationFinding(
            "configuration", FINE, f"no configuration in {facts.directory} has istio-cni in it (any more)"
        )
    steps = take_over(facts.view, entry, here.cni_conf_name, mode=mode)
    if steps.error:
        yield MigrationFinding(
            "configuration", OBSTACLE, steps.error, f"put {facts.directory} right, or set cni_conf_dir"
        )
    for words in steps.remarks:
        if ISTIO not in words:
            yield MigrationFinding("configuration", NOTE, words)


def _agents(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    if facts.agent:
        words = f"its agent runs ({facts.agent}): our entry comes first next to it, the rest when it has gone"
        yield MigrationFinding(
            "istio-cni", NOTE, words, "take its DaemonSet from this node when ours runs; see docs/migrating.md"
        )
    else:
        yield MigrationFinding("istio-cni", FINE, "its agent does not run")
    if facts.ours:
        words = f"ours does not run: {facts.ours}"
        yield MigrationFinding(
            "agent", OBSTACLE, words, "install Sluice on this node first: enrolled pods could not start"
        )
    else:
        yield MigrationFinding("agent", FINE, "ours runs")


def _binary(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    place = f"{facts.plugins}/{ISTIO}"
    named = bool(istio.places(facts.view))
    if facts.binary:
        words = f"{place} stays, for pods that were started with it" if facts.cached else f"{place} is there"
        yield MigrationFinding("binary", NOTE if facts.cached else FINE, words)
    elif facts.cached:
        words = f"{place} is missing, and this runtime deletes {facts.cached} pods with it"
        yield MigrationFinding("binary", OBSTACLE, words, "put it back until those pods have ended, or reboot the node")
    elif named:
        yield MigrationFinding("binary", NOTE, f"{place} is missing: no pod can start until istio-cni's entry is out")


def _pods(facts: MigrationFacts) -> Iterator[MigrationFinding]:
    yield from map(_problem, facts.problems)
    theirs, ours, sidecars = (facts.by(whom) for whom in (ISTIO_CNI, SLUICE, SIDECAR))
    yield MigrationFinding("pods", FINE, f"{len(theirs)} captured by istio-cni, {len(ours)} by us")
    if facts.host:
        yield MigrationFinding("host", FINE, f"the node's probes are exempt by {facts.host}")
    if sidecars:
        words = f"{len(sidecars)} pods have the rules of a sidecar, which we do not make: {_named(sidecars)}"
        todo = (
            "let istio-init make them (pilot.cni.enabled=false) and restart those pods; if it does: --accept sidecars"
        )
        yield MigrationFinding("sidecars", OBSTACLE, words, todo)


def _named(found: Collection[object]) -> str:
    names = [getattr(one, "pod", "") or getattr(one, "netns", "") for one in found]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _settings(facts: MigrationFacts, here: Settings) -> Iterator[MigrationFinding]:
    translated = translated_of(facts)
    for line in differences(translated, here):
        todo = "set it as istio-cni has it, or --accept settings if the change is meant"
        yield MigrationFinding("settings", OBSTACLE, f"istio-cni has {line}", todo)
    for words in translated.remarks:
        yield MigrationFinding("settings", NOTE, words)


def translated_of(facts: MigrationFacts) -> Translated:
    """What a person gave, else what istio-cni's entries say; directories that are found by themselves are left out."""
    found = dict(facts.settings)
    if not found:
        for place in istio.places(facts.view):
            found |= values.of_entry(place.entry)
    there = {"cni_conf_dir": facts.directory, "cni_bin_dir": facts.plugins}
    translated = translate(found)
    needed = {key: value for key, value in translated.settings.items() if str(value).rstrip("/") != there.get(key)}
    return replace(translated, settings=needed)

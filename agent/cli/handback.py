# SPDX-License-Identifier: Apache-2.0
"""`sluice handback --all`: converts captured pods to istio-cni's rules and forgets them.

Exit 0 all are handed back, 1 some are not, 2 it could not start.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agent.backends import istio_handback, layer_ownership
from agent.backends.base import PodLayer
from agent.backends.ebpf.pins import Pins
from agent.backends.hostprobes.layers import layers
from agent.backends.registry import mechanisms
from agent.cli import options, settings_sources
from agent.cli.uncapture import forget_account, hold, leftovers
from agent.core.errors import KernelError, SluiceError, StaleError
from agent.core.model.ownership import Owner
from agent.core.model.redirect import Redirect
from agent.core.policy.decide import decide
from agent.core.settings import Settings
from agent.core.text import table
from agent.kernel.host_netns import HostNetns
from agent.kernel.pod_netns import PodNetns
from agent.reconciler.converge import PASSES, settle
from agent.reconciler.removal import LEFT, REMAINS, uncapture_host
from agent.sources.netns import existing
from agent.sources.state import backend_record
from agent.sources.state.notes import Note, Notes

_NETFILTER = ("nftables", "iptables", "iptables-legacy")
_BY_SOCKET = (
    "it was captured by eBPF: connections that came in before are cut (to keep them, let an agent switch to "
    "another backend first)"
)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "handback", help="leave captured pods as istio-cni would have programmed them, and forget them"
    )
    parser.add_argument("--all", action="store_true", required=True, help="every captured pod of this node")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be changed")
    options.netns(parser)
    options.finish(parser, _run, options.output, settings_sources.add_options)


@dataclass(slots=True)
class Row:
    """One pod and its result; `scripts` were applied, or would be."""

    netns: str
    pod: str
    _: KW_ONLY
    mechanism: str = ""
    result: str = "not handed back"
    scripts: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def _run(args: argparse.Namespace) -> int:
    settings = settings_sources.load(args)
    options.require_root("sluice handback enters network namespaces")
    problems: list[str] = []
    rows = hand_back_all(settings, [Path(path) for path in args.netns], problems, dry_run=args.dry_run)
    value = {"pods": [asdict(row) for row in rows], "problems": problems}
    lines = [(r.netns, r.pod, r.mechanism, r.result, "; ".join(r.remarks)) for r in rows]
    pods = table(("NETNS", "POD", "MECHANISM", "RESULT", "DETAILS"), lines) if rows else "No pod is captured here."
    scripts = [f"# {row.netns}\n{script}" for row in rows if args.dry_run for script in row.scripts]
    options.emit(args.output, value, "\n".join([pods, *(f"cannot examine: {one}" for one in problems), *scripts]))
    return 1 if problems or any(row.result == "not handed back" for row in rows) else 0


def hand_back_all(settings: Settings, only: list[Path], problems: list[str], *, dry_run: bool) -> list[Row]:
    """Hands back the namespaces in `only`, or all of the node and the node itself. Raises SluiceError before the first.

    Adds to `problems` why a namespace cannot be examined.
    """
    with hold(settings.run_dir, "handback"):
        rows = list(_pods(settings, only, problems, dry_run=dry_run))
        if not only:
            if not dry_run and not problems and all(row.result == "handed back" for row in rows):
                leftovers(Pins.of(settings.bpf_dir), dry_run=False)
            rows += _host(dry_run=dry_run)
    return rows


def _pods(settings: Settings, only: list[Path], problems: list[str], *, dry_run: bool) -> Iterator[Row]:
    """Hands back every namespace that holds something of Sluice, or that a note calls captured."""
    run_dir = settings.run_dir
    known = existing.known(run_dir)  # before State.load, which drops pins that no note belongs to
    paths = only or existing.netns_paths(run_dir, known)
    namespaces = list(existing.namespaces(paths, problems))
    notes = {note.pod.uid: note for note in Notes(run_dir).load()} if Path(run_dir).is_dir() else {}
    for netns in namespaces:
        pod = existing.pod(netns, run_dir, known)
        note = notes.get(pod.uid) if pod else None
        row = Row(netns.origin, pod.name or pod.uid if pod else "")
        with contextlib.closing(PodNetns(netns)) as target:
            try:
                there = hand_back(row, target, note, settings, dry_run=dry_run)
            except SluiceError as error:
                there = True
                row.remarks = (*row.remarks, str(error))
            if row.result == "handed back":
                forget_account(Pins.of(settings.bpf_dir), target, problems)
        if there:
            yield row
        if pod and row.result == "handed back":
            existing.forget(run_dir, [pod.uid])


def _host(*, dry_run: bool) -> Iterator[Row]:
    """Removes the exemption of the node's probes: istio-cni creates its own, and fails if a chain of Sluice exists."""
    with contextlib.closing(HostNetns()) as host:
        removal = uncapture_host(host, layers("off")[1], layer_ownership.host_layer_owner, dry_run=dry_run)
    if removal is None or removal.result == LEFT:
        return
    result = "not handed back" if removal.result == REMAINS else "would be handed back" if dry_run else "handed back"
    note = "probe exemption removed: until istio-cni creates its own, probes are captured"
    yield Row(
        "host",
        "",
        mechanism=",".join(removal.layers),
        result=result,
        scripts=removal.scripts,
        remarks=(note, *removal.errors),
    )


def hand_back(row: Row, target: PodNetns, note: Note | None, settings: Settings, *, dry_run: bool) -> bool:
    """Returns whether anything of Sluice was there; fills in the row. Raises SluiceError; earlier work stays."""
    layers_by_name = mechanisms(ipv6=settings.ipv6, pins=Pins.of(settings.bpf_dir))
    captured_by = [
        n for n in _NETFILTER if layer_ownership.layer_owner(n, layers_by_name[n].read(target)) is Owner.SLUICE
    ]
    captured = note is not None and note.captured
    if not captured_by and not captured:
        return False
    if note is None or not captured:
        free = f"sluice uncapture --all --netns {target.netns.origin}"
        raise SluiceError(f"no note says what its rules must do; left as it is, `{free}` removes them")
    old = backend_record.load(settings.run_dir)
    row.mechanism = (
        captured_by[0] if captured_by else old.backend if old and old.backend in _NETFILTER else _NETFILTER[0]
    )
    decision = decide(note.pod, settings)
    if decision.redirect is None:
        raise SluiceError(f"{decision.reason}: the settings do not want it captured; left as it is")
    facts = target.facts()
    want, lost = istio_handback.known_to_peers(decision.redirect.within(ipv6=facts.ipv6))
    want = replace(want, dns=want.dns and facts.loopback4 and (facts.loopback6 or not facts.ipv6))
    silent = (
        ("of connections from before its enrolment, those that were silent since are cut",) if note.preexisting else ()
    )
    entry = layers_by_name["ebpf"].plan(None, layers_by_name["ebpf"].read(target))
    row.remarks = (*decision.warnings, *lost, *silent, *([_BY_SOCKET] if entry else []))
    chosen = (layers_by_name["routing"], layers_by_name[row.mechanism])
    if dry_run:
        scripts = [script for layer in chosen for script in _dry(target, layer, want)]
        row.result = "would be handed back"
        row.scripts = (*scripts, *([str(entry)] if entry else []))
        return True
    retired = [one for one in reversed(layers_by_name.values()) if one not in chosen]
    done = [one.script for one in settle(target, want, chosen, retired).applied]
    row.scripts = (*done, *(script for layer in chosen for script in strip(target, layer, want)))
    row.result = "handed back"
    return True


def strip(target: PodNetns, layer: PodLayer, want: Redirect) -> tuple[str, ...]:
    """Converts correct rules of Sluice to istio-cni's, and verifies them. Raises SluiceError. Returns the scripts."""
    done: list[str] = []
    for _ in range(PASSES):
        plan = istio_handback.plan(
            layer.name, want, layer.read(target), istio_handback.rule_numbers(target, layer.name)
        )
        if not plan:
            return tuple(done)
        with contextlib.suppress(StaleError):  # something changed in between: read again
            layer.apply(target, plan)
            done.append(str(plan))
    raise KernelError(f"hand back {layer.name}", 0, "another process keeps changing it")


def _dry(target: PodNetns, layer: PodLayer, want: Redirect) -> tuple[str, ...]:
    repair = str(layer.plan(want, layer.read(target)))
    plan = istio_handback.plan(layer.name, want, layer.read(target), istio_handback.rule_numbers(target, layer.name))
    return tuple(script for script in (repair, str(plan)) if script)

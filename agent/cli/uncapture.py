# SPDX-License-Identifier: Apache-2.0
"""`sluice uncapture --all`: removes everything of Sluice from this node; needs no agent, API server or state.

Exit 0 nothing of Sluice is left, 1 something is left, 2 it could not start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from agent.backends import layer_ownership
from agent.backends.ebpf.pins import Pins
from agent.backends.hostprobes.layers import layers as host_layers
from agent.backends.registry import mechanisms
from agent.cli import options, settings_sources
from agent.core import names
from agent.core.errors import KernelError, KubeError, SettingsError, SluiceError
from agent.core.model.ownership import Owner
from agent.core.settings import Settings
from agent.core.text import table
from agent.flows.ebpf.accounted_pods import AccountedPods
from agent.install.host_root import HostRoot
from agent.kernel.bpf import bpffs
from agent.kernel.host_netns import HostNetns
from agent.kernel.pod_netns import PodNetns
from agent.kernel.unix_socket import claim
from agent.migration.istio_agent import RUN_DIR, istio_agent_runs
from agent.reconciler.removal import LEFT, REMAINS, REMOVED, WOULD, Removal, uncapture, uncapture_host, uncapture_left
from agent.sources.netns import existing
from agent.sources.netns.existing import ExistingNetns
from agent.sources.state import backend_record

_HOST, _NODE = "host", "node"  # rows that are no pod's


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "uncapture", help="remove all rules of Sluice from this node, without an agent; exit 1 if any is left"
    )
    parser.add_argument("--all", action="store_true", required=True, help="every namespace that holds something")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be removed; an agent may run")
    parser.add_argument("--foreign", action="store_true", help="also remove what another agent has programmed in pods")
    options.netns(parser)
    parser.add_argument(
        "--annotations",
        action="store_true",
        help="then also remove the annotation ambient.istio.io/redirection of this node's pods, at the API server",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=os.environ.get("SLUICE_CONFIG", ""),
        help="for --annotations: the agent's settings, which say where the API server is (or $SLUICE_CONFIG)",
    )
    options.finish(parser, _run, options.run_dir, options.bpf_dir, options.output)


@dataclass(frozen=True, slots=True)
class Row:
    """One namespace, or the host, and its result."""

    netns: str
    pod: ExistingNetns | None
    removal: Removal

    @property
    def right(self) -> bool:
        return self.removal.result != REMAINS and not self.removal.errors

    def as_dict(self) -> dict[str, Any]:
        pod = (self.pod.name or self.pod.uid) if self.pod else ""
        return {"netns": self.netns, "pod": pod, **asdict(self.removal), "found": self.removal.found.value}


def _run(args: argparse.Namespace) -> int:
    if args.annotations and args.netns:
        raise SluiceError("--annotations is for all pods of the node, --netns for some; give one of them")
    options.require_root("sluice uncapture enters network namespaces")
    with contextlib.nullcontext() if args.dry_run else hold(args.run_dir, "uncapture"):
        return _all(args)


def _all(args: argparse.Namespace) -> int:
    known = existing.known(args.run_dir)
    problems = list[str]()
    paths = [Path(path) for path in args.netns] or existing.netns_paths(args.run_dir, known)
    rows, seen = remove(args, known, paths, problems)
    if not args.netns:
        rows += leftovers(Pins.of(args.bpf_dir), dry_run=args.dry_run)
        with contextlib.closing(HostNetns()) as host:
            removal = uncapture_host(
                host, host_layers("off")[1], layer_ownership.host_layer_owner, dry_run=args.dry_run
            )
        rows += [Row(_HOST, None, removal)] if removal else []
    if not args.dry_run:
        stay = {row.pod.uid for row in rows if row.pod and not row.right}
        existing.forget(args.run_dir, {one.uid for one in (seen if args.netns else known)} - stay)
        if not args.netns and all(row.right for row in rows):
            backend_record.forget(args.run_dir)  # what is installed after this is another installation
    remarks = list[str]()
    if args.annotations and not args.dry_run:
        captured = [row for row in rows if row.removal.result in (LEFT, REMAINS) and row.netns not in (_HOST, _NODE)]
        remarks = take_back_annotations(args.config, [one.pod.uid if one.pod else "" for one in captured], problems)
    value = {"namespaces": [row.as_dict() for row in rows], "problems": problems, "remarks": remarks}
    options.emit(args.output, value, _text(value, dry_run=args.dry_run))
    return 0 if not problems and all(row.right for row in rows) else 1


@contextlib.contextmanager
def hold(run_dir: str, command: str) -> Iterator[None]:
    """Ensures that no agent runs on the directory or starts on it meanwhile. Raises SluiceError."""
    with contextlib.ExitStack() as held:
        try:
            if Path(run_dir).is_dir():
                held.callback(os.close, claim(Path(run_dir)))
        except SluiceError:
            cause = f"an agent runs on {run_dir} and would put everything back; stop it first, then run this again"
            raise SluiceError(f"{command}: {cause}") from None
        yield


def remove(
    args: argparse.Namespace, known: Sequence[ExistingNetns], paths: Sequence[Path], problems: list[str]
) -> tuple[list[Row], list[ExistingNetns]]:
    """Cleans every namespace that `paths` lead to; also returns which of the `known` pods they belong to."""
    layers = tuple(mechanisms(pins=Pins.of(args.bpf_dir)).values())
    rows = list[Row]()
    seen = list[ExistingNetns]()
    for netns in existing.namespaces(paths, problems):
        pod = existing.pod(netns, args.run_dir, known)
        seen += [pod] if pod else []
        with contextlib.closing(PodNetns(netns)) as target:
            noted = bool(pod and pod.captured)
            removal = uncapture(
                target, layers, layer_ownership.layer_owner, noted=noted, foreign=args.foreign, dry_run=args.dry_run
            )
            if removal and removal.result == REMOVED:
                forget_account(Pins.of(args.bpf_dir), target, problems)
        rows += [Row(netns.origin, pod, removal)] if removal else []
    return rows, seen


def forget_account(pins: Pins, target: PodNetns, problems: list[str]) -> None:
    """Detaches the accounting programs: they outlive the agent and would keep refusing ztunnel's ports in this pod."""
    try:
        AccountedPods(pins.accounting, watching=False).release(target.netns.id.cookie)
    except KernelError as error:
        problems.append(f"{target.netns.origin}: its connections are still accounted for: {error}")


def leftovers(pins: Pins, *, dry_run: bool) -> list[Row]:
    """Removes what backend ebpf keeps for ended pods, and for all pods.

    The whole directory is removed last, with what another version created: that only requires removing files.
    """
    removal = uncapture_left(tuple(mechanisms(pins=pins).values()), dry_run=dry_run)
    rows = [Row(_NODE, None, removal)] if removal else []
    if pins.root.exists() and not dry_run:
        rows = [Row(_NODE, None, _directory(pins.root, "ebpf-programs", removal.errors if removal else ()))]
    if pins.accounting.root.exists():
        root = pins.accounting.root
        would = Removal(Owner.SLUICE, WOULD, ("accounting",), scripts=(f"rm -r {root}",))
        rows.append(Row(_NODE, None, would if dry_run else _directory(root, "accounting")))
    return rows


def _directory(root: Path, layer: str, errors: tuple[str, ...] = ()) -> Removal:
    done = Removal(Owner.SLUICE, REMOVED, (layer,), scripts=(f"rm -r {root}",))
    try:
        bpffs.remove_tree(root)
    except SluiceError as error:
        done = replace(done, result=REMAINS, errors=(*errors, str(error)))
    return done


def _text(value: dict[str, Any], *, dry_run: bool) -> str:
    rows = value["namespaces"]
    header = ("NETNS", "POD", "PROGRAMMED BY", "RESULT", "LAYERS", "DETAILS")
    lines = [
        (one["netns"], one["pod"], one["found"], one["result"], ",".join(one["layers"]), "; ".join(one["errors"]))
        for one in rows
    ]
    scripts = [f"# {one['netns']}\n{script}" for one in rows if dry_run for script in one["scripts"]]
    rows_text = table(header, lines) if lines else "Nothing of Sluice is on this node."
    return "\n".join([rows_text, *value["remarks"], *(f"cannot examine: {one}" for one in value["problems"]), *scripts])


_REFUSED = (401, 403)  # the role is gone, and will not come back by waiting
_BY_HAND = f"do it by hand: kubectl annotate pods --all -A {names.REDIRECTION}-"


def take_back_annotations(config: str, captured: Collection[str], problems: list[str]) -> list[str]:
    """Removes the annotation of all pods of the node except the `captured` ones.

    `captured` has UIDs, "" for a pod with an unknown UID; `config` is the settings file. Returns lines for people; adds
    to `problems` what is worth another try.
    """
    given = argparse.Namespace(**{field.name: None for field in fields(Settings)} | {"config": config})
    try:
        settings = settings_sources.load(given)
        if settings.kube_server in ("", "none"):
            return []
        if other := istio_agent_runs(HostRoot(settings.host_root), [RUN_DIR], Path("/proc")):
            return [f"{names.REDIRECTION} stays on all pods: istio-cni's agent runs here ({other})"]
        if "" in captured:
            return [f"{names.REDIRECTION} stays on all pods: which of them are still captured is not known"]
        done = asyncio.run(_take_back(settings, captured))
    except KubeError as error:
        if error.status in _REFUSED:
            return [f"{names.REDIRECTION} stays on the pods: {error}; {_BY_HAND}"]
        problems.append(f"{names.REDIRECTION}: {error}")
        return []
    except SettingsError as error:
        problems.append(f"{names.REDIRECTION}: {error}")
        return []
    return [f"{names.REDIRECTION} taken back from {len(done)} pods"] if done else []


async def _take_back(settings: Settings, captured: Collection[str]) -> list[str]:
    from agent.sources.kube import annotating  # with TLS and all: only where there is a cluster
    from agent.sources.kube.access import Access
    from agent.sources.kube.api_client import Client

    client = Client(Access(settings.kube_server, settings.kube_token_file, settings.kube_ca_file))
    try:
        return await annotating.take_back(client, settings.node_name or socket.gethostname(), captured)
    finally:
        await client.close()

# SPDX-License-Identifier: Apache-2.0
"""Collects the facts of one node; it only reads."""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from agent.backends import layer_ownership
from agent.backends.ebpf.pins import Pins
from agent.backends.hostprobes.layers import layers as host_layers
from agent.backends.registry import mechanisms
from agent.core.errors import SluiceError
from agent.core.model.ownership import Owner, owner_of
from agent.core.settings import Settings
from agent.install import conflists, runtime
from agent.install.conflists import ISTIO
from agent.install.host_root import HostRoot
from agent.install.netdir import NetDir
from agent.kernel import exec, xtables
from agent.kernel.admin_socket import ask
from agent.kernel.host_netns import HostNetns
from agent.kernel.pod_netns import PodNetns
from agent.migration import istio_confs
from agent.migration.istio_agent import istio_agent_runs
from agent.migration.migration_facts import ISTIO_CNI, SIDECAR, SLUICE, MigrationFacts, Programmed
from agent.sources.netns import existing

_CACHE = "/var/lib/cni/results"  # libcni.CacheDir; only CRI-O deletes pods by the lists in it
_CHAINS = frozenset({"ISTIO_REDIRECT", "ISTIO_IN_REDIRECT"})  # only a sidecar's; ISTIO_OUTPUT is in both rule sets
_TABLE = "istio-proxy-nat"
_BY = {Owner.SLUICE: SLUICE, Owner.FOREIGN: ISTIO_CNI}


def collect(settings: Settings, only: Iterable[Path] = (), proc: Path = Path("/proc")) -> MigrationFacts:
    """Collects the facts. Raises SluiceError when the directory cannot be read.

    `only`: these network namespaces, without the host's.
    """
    host = HostRoot(settings.host_root)
    problems = list[str]()
    where = runtime.find(settings, host, proc)
    view = NetDir(host, where.conf.path).view()
    paths = list(only)
    why, ztunnels = _sluice_agent(settings.run_dir)
    crio = where.runtime is not None and where.runtime.name == "crio"
    return MigrationFacts(
        directory=where.conf.path,
        plugins=where.bin.path,
        view=view,
        binary=host.path(f"{where.bin.path}/{ISTIO}").is_file(),
        agent=istio_agent_runs(host, istio_confs.run_dirs(view), proc),
        ours=why,
        ztunnels=ztunnels,
        socket=Path(settings.zds_socket).exists(),
        cached=_cached(host.path(_CACHE)) if crio else None,
        programmed=tuple(_programmed(settings, paths, problems)),
        host="" if paths else _host(problems),
        problems=tuple(problems),
    )


def _sluice_agent(run_dir: str) -> tuple[str, int | None]:
    """Returns why the Sluice agent does not answer, and how many ztunnels it has if it does."""
    try:
        return "", int(ask(run_dir, "/v1/status")["ztunnel_connections"])
    except SluiceError as error:
        return str(error), None


def _cached(folder: Path) -> int:
    """Counts the cached lists that name istio-cni; in libcni.cachedInfo, `config` is the list in base64."""
    count = 0
    with contextlib.suppress(OSError):
        for file in sorted(folder.iterdir()):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, binascii.Error):
                kept = json.loads(file.read_bytes())
                count += conflists.mentions(json.loads(base64.b64decode(kept["config"])), ISTIO)
    return count


def _programmed(settings: Settings, only: list[Path], problems: list[str]) -> Iterable[Programmed]:
    known = existing.known(settings.run_dir)
    layers = mechanisms(pins=Pins.of(settings.bpf_dir))
    for netns in existing.namespaces(only or existing.netns_paths(settings.run_dir, known), problems):
        pod = existing.pod(netns, settings.run_dir, known)
        with contextlib.closing(PodNetns(netns)) as target:
            try:
                owner = owner_of(
                    layer_ownership.layer_owner(name, layer.read(target)) for name, layer in layers.items()
                )
                by = SIDECAR if has_sidecar(target) else _BY.get(owner, "")
            except SluiceError as error:
                problems.append(f"{netns.origin}: {error}")
                continue
        if by:
            yield Programmed(netns.origin, by, (pod.name or pod.uid) if pod else "")


def has_sidecar(target: PodNetns) -> bool:
    """Searches nf_tables, which has the chains of iptables-nft too, and the tables of legacy iptables if they exist."""
    if any(table == _TABLE or chain in _CHAINS for table, chain in target.nft.chains()):
        return True
    if "nat" not in target.netns.call(partial(xtables.listed, 4)):  # reading the table would create it
        return False
    saved = exec.run(["iptables-legacy-save", "-t", "nat"], within=target.netns, check=False).stdout
    return any(f":{chain} " in saved for chain in _CHAINS)


def _host(problems: list[str]) -> str:
    try:
        with contextlib.closing(HostNetns()) as target:
            _, layers = host_layers("off")
            owners = {one.name: layer_ownership.host_layer_owner(one.name, one.read(target)) for one in layers}
            return _BY.get(layer_ownership.host_owner(owners), "")
    except (SluiceError, OSError) as error:
        problems.append(f"the host's rules: {error}")
        return ""

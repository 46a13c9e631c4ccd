# SPDX-License-Identifier: Apache-2.0
"""Feature by feature what this node's kernel can do for a backend, each tried for real in a namespace of its own.

What a kernel's version or its list of modules says is no answer: distributions leave out modules, and others
load on first use. The cheap sample at every start is each backend's probe; this is for naming what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.backends.ebpf import feature_trials as ebpf
from agent.backends.nftables.rendering import table_command
from agent.backends.requirements import (
    Ebpf,
    HasIpv6,
    Need,
    PolicyRuleRequirement,
    Printed,
    ProgramRequirement,
    Restored,
    Transaction,
    needs,
)
from agent.core import names
from agent.core.errors import SluiceError
from agent.core.wire.rtnetlink import LookupRule
from agent.kernel import exec, proc, scratch, xtables
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.netlink.route_socket import RouteSocket


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One need, tried. `words` are the kernel's when it refused; `without` is set where it is optional."""

    name: str
    needed_by: tuple[str, ...]
    present: bool
    words: str = ""
    remedy: str = ""
    without: str = ""

    @property
    def lacking(self) -> bool:
        """True if it is missing and nothing works without it."""
        return not self.present and not self.without


def attempt(need: Need, bpf_dir: str = names.BPF_DIR) -> str:
    """Returns "" if it works, otherwise the error text of the kernel or the program."""
    try:
        scratch.call(lambda: _try(need, bpf_dir))
    except (SluiceError, OSError) as error:
        return str(error)
    return ""


def examine(choice: str, *, ipv6: bool = True, attempt: Callable[[Need], str] = attempt) -> tuple[Feature, ...]:
    """Returns every need of one choice. Loads modules as programming a pod would; makes nothing that stays."""
    features: dict[str, Feature] = {}
    for need in needs(choice, ipv6=ipv6):
        if need.behind and not (need.behind in features and features[need.behind].present):
            continue  # it would only say the same again
        error = attempt(need)
        remedy = need.remedy.replace("{release}", os.uname().release) if error else ""
        features[need.name] = Feature(
            name=need.name, needed_by=(choice,), present=not error, words=error, remedy=remedy, without=need.without
        )
    return tuple(features.values())


def lacking(features: Iterable[Feature]) -> tuple[str, ...]:
    """Returns one line for each that is missing and needed: what, the kernel's words, what to do."""
    return tuple(f"{one.name} is missing ({one.words}): {one.remedy}" for one in features if one.lacking)


def merge(*examined: tuple[Feature, ...]) -> tuple[Feature, ...]:
    """Merges the features of several choices; each stands once."""
    merged: dict[str, Feature] = {}
    for one in (one for features in examined for one in features):
        before = merged.get(one.name)
        by = (*before.needed_by, *one.needed_by) if before else one.needed_by
        merged[one.name] = Feature(
            name=one.name, needed_by=by, present=one.present, words=one.words, remedy=one.remedy, without=one.without
        )
    return tuple(merged.values())


def _try(need: Need, bpf_dir: str) -> None:
    """Raises SluiceError or OSError when it is refused; in a scratch namespace."""
    match need.trial:
        case HasIpv6():
            if not Path("/proc/thread-self/net/if_inet6").exists():
                raise SluiceError("the kernel has no IPv6, or it is switched off")
        case PolicyRuleRequirement(family):
            with contextlib.closing(RouteSocket()) as route:
                rule = LookupRule(
                    family,
                    names.RULE_PREFERENCE,
                    mark=names.CONNECTION_MARK,
                    mask=names.MARK_MASK,
                    table=names.ROUTE_TABLE,
                )
                route.change(rule, add=True)
        case Transaction(commands):
            with contextlib.closing(NftSocket()) as nft:
                nft.commit(f"try {need.name}", commands, None)
        case Printed(flags):
            _print(flags)
        case Ebpf(name):
            ebpf.attempt(name, bpf_dir)
        case ProgramRequirement(name):
            if shutil.which(name, path=exec.PATH) is None:
                raise SluiceError(f"{name} is not installed")
        case Restored(program, script):
            exec.run([program, "--noflush"], stdin=script, env=xtables.LOCK, seconds=10)


def _print(flags: int) -> None:
    """Tries printing by the kernel: the nft of an image says nothing of the node's."""
    if shutil.which("nft", path=exec.PATH) is None or proc.in_container():
        return
    with contextlib.closing(NftSocket()) as nft:
        nft.commit("make a table", (table_command("sluice-try", flags),), None)
    exec.run(["nft", "--check", "-f", "-"], stdin=exec.run(["nft", "list", "ruleset"], seconds=10).stdout, seconds=10)

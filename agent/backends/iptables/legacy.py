# SPDX-License-Identifier: Apache-2.0
"""The iptables backend, legacy variant: reads by socket options, writes by iptables-legacy-restore.

Unlike nf_tables, legacy xtables has no way to remove a table or a base chain, nor to know what they were before: after
a removal, tables that were not there before remain, empty and with policy ACCEPT. Nor does the kernel notify of
changes, or refuse one that was planned for another state: drift is found by reading alone, and what another process
changes while iptables-legacy-restore rewrites the same table may be lost, as between any two iptables.
Each change sets the counters of policies, not of rules, to zero, as that of any iptables-legacy program does.
Foreign rules before ours are reported for nf_tables, not for legacy tables.
While a namespace has no IPv6 its IPv6 tables are neither read nor written: rules made before stay as they are.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from agent.backends.base import Support
from agent.backends.iptables import legacy_reading, rendering
from agent.backends.iptables.bases import Restore
from agent.backends.iptables.comparison import differences, refuse_taken, same
from agent.backends.iptables.legacy_reading import LegacyTable
from agent.backends.iptables.reading import TABLES
from agent.backends.iptables.rendering import XtTable
from agent.backends.iptables.rule_digests import RuleDigests
from agent.backends.netfilter import foreign_rules
from agent.backends.netfilter.dumps import Ruleset
from agent.backends.netfilter.ruleset_reader import Reader
from agent.core.errors import CommandError, KernelError
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.core.wire.nftables import NFPROTO_INET
from agent.kernel import exec, scratch, xtables
from agent.kernel.pod_netns import PodNetns
from agent.kernel.xtables import Key

_PROGRAM = {4: "iptables-legacy-restore", 6: "ip6tables-legacy-restore"}
_NOTHING = Redirect(ipv4=False, ipv6=False)


@dataclass(frozen=True, slots=True)
class LegacyState:
    """Per family (4, 6) those of our tables that are there; nothing for a family that the namespace lacks.

    `remarks` are on what comes before our rules.
    """

    families: dict[int, dict[str, XtTable]]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Last:
    """The result of the last read of a namespace, and its meaning with the digests known by then."""

    tables: dict[Key, LegacyTable]
    version: int
    have: LegacyState


class IptablesLegacyBackend:
    """Four verbs over iptables-legacy-restore."""

    name = "iptables-legacy"
    outlives = False

    def __init__(self, *, ipv6: bool = True) -> None:
        """Takes `ipv6` False to leave the node's own IPv6 untried; pods that have it are still read."""
        self._ipv6 = ipv6
        self._digests = RuleDigests()
        self._before = Reader(_before, ())
        self._last: WeakKeyDictionary[PodNetns, _Last] = WeakKeyDictionary()

    def probe(self) -> Support:
        for family, program in _PROGRAM.items():
            if (family == 4 or self._ipv6) and shutil.which(program, path=exec.PATH) is None:
                return Support(False, f"{program} is not installed; install iptables 1.8 with its legacy variant")
        try:
            scratch.call(lambda: _commit_sample(ipv6=self._ipv6))
        except (CommandError, KernelError) as error:
            needs = "ip_tables, ip6_tables, the tables raw, mangle, nat of both, and xt modules"
            return Support(False, f"the kernel refused our rules ({error}); it needs {needs}")
        return Support(True)

    def read(self, target: PodNetns) -> LegacyState:
        last = self._last.get(target)
        tables = _tables(target, last.tables if last else {})
        version = self._digests.version
        if last is None or last.tables is not tables or last.version != version:
            have = LegacyState({4: {}, 6: {}})
            for (family, name), table in tables.items():
                have.families[family][name] = self._digests.verified(table)
            last = self._last[target] = _Last(tables, version, have)
        return replace(last.have, remarks=self._remarks(target)) if _jumps(last.have) else last.have

    def _remarks(self, target: PodNetns) -> tuple[str, ...]:
        try:
            return self._before.read(target)
        except KernelError:
            return ()  # a kernel without nf_tables

    def plan(self, want: Redirect | None, have: LegacyState) -> Plan[Restore]:
        steps: list[Step[Restore]] = []
        drift: list[str] = []
        for family in (4, 6):
            actual = have.families[family]
            wanted = rendering.render(want or _NOTHING, family)
            if wanted.tables:
                refuse_taken(actual)
            if not same(wanted.tables, actual):
                drift += differences(family, wanted.tables, actual)
                script = rendering.script(wanted, actual)
                steps.append(Step(f"# {_PROGRAM[family]} --noflush\n{script}".rstrip(), Restore(family, script)))
        return Plan(tuple(steps), tuple(drift), remarks=have.remarks)

    def apply(self, target: PodNetns, plan: Plan[Restore]) -> None:
        for step in plan.steps:
            _restore(step.payload, target)
        # Only of tables that were rewritten just now: others may have been foreign before.
        for (family, name), table in _tables(target, {}).items():
            if any(step.payload.family == family and f"*{name}\n" in step.payload.script for step in plan.steps):
                self._digests.learn(table)


def _jumps(have: LegacyState) -> bool:
    return any(table.jumps for family in have.families.values() for table in family.values())


def _before(ruleset: Ruleset, _: int | None, ipv6: bool) -> tuple[str, ...]:
    """Leaves out chains with the priority of legacy tables: their order is not known."""
    return foreign_rules.chains(ruleset, NFPROTO_INET, "", ipv6=ipv6)


def _tables(target: PodNetns, last: dict[Key, LegacyTable]) -> dict[Key, LegacyTable]:
    """Reads all tables of Sluice; returns `last` itself when they are unchanged."""
    known = {key: table.info for key, table in last.items()}
    raw = target.netns.call(lambda: xtables.again(TABLES, known))
    if raw.keys() == last.keys() and all(last[key].holds(data) for key, (_, data) in raw.items()):
        return last
    if known:
        raw = target.netns.call(lambda: xtables.again(TABLES, {}))
    return {key: legacy_reading.read_table(key[0], *parts) for key, parts in raw.items()}


def _restore(step: Restore, target: PodNetns | None = None) -> None:
    """Runs iptables-restore. --wait without a number sleeps until the lock is free; only another agent can hold it."""
    within = target.netns if target else None
    command = [_PROGRAM[step.family], "--noflush", "--wait"]
    exec.run(command, stdin=step.script, within=within, env=xtables.LOCK, seconds=10)


def _commit_sample(*, ipv6: bool) -> None:
    """Applies every rule of every variant in a namespace of its own; checks that they are read as written."""
    sample = Redirect(virtual_interfaces=("lo",))
    for family in xtables.families():
        if family == 6 and not ipv6:
            continue
        wanted = rendering.render(sample, family)
        _restore(Restore(family, rendering.script(wanted, {})))
        held = xtables.read(TABLES, ())[family]
        tables = {name: legacy_reading.read_table(family, *parts).table for name, parts in held.items()}
        for line in differences(family, wanted.tables, tables):
            raise KernelError("try the rules", 0, f"they are not read as they were written: {line}")

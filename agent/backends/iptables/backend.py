# SPDX-License-Identifier: Apache-2.0
"""The iptables backend (nf_tables variant): at most one process per family and change, none to compare.

While a namespace has no IPv6 its IPv6 tables are neither read nor written: rules made before stay as they are.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from agent.backends.base import Support
from agent.backends.iptables import bases, reading, rendering
from agent.backends.iptables.bases import Payload, Restore
from agent.backends.iptables.comparison import differences, refuse_taken, same
from agent.backends.iptables.reading import XtState
from agent.backends.iptables.rendering import XtTable
from agent.backends.netfilter import foreign_rules
from agent.backends.netfilter.dumps import ChainRef, Content, Ruleset
from agent.backends.netfilter.message_parts import comment_data
from agent.backends.netfilter.rules import Hook, Table
from agent.backends.netfilter.ruleset_reader import Reader
from agent.core.errors import CommandError, KernelError
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import Message, attribute
from agent.core.wire.nftables import NFPROTO
from agent.kernel import exec, scratch
from agent.kernel.pod_netns import PodNetns

_PROGRAM = {4: "iptables-nft-restore", 6: "ip6tables-nft-restore"}
_NOTHING = Redirect(ipv4=False, ipv6=False)
_PLACES = tuple(
    ChainRef(family, table, chain, shared)
    for family, table, hook in product(NFPROTO.values(), reading.TABLES, Hook)
    for chain, shared in ((rendering.CHAINS[hook], False), (hook.name, True))
)


@dataclass(frozen=True, slots=True)
class XtSeen:
    """Sluice's rules, in the families that the namespace has; and remarks on foreign rules before them."""

    held: XtState
    remarks: tuple[str, ...] = ()


class IptablesBackend:
    """Four verbs over iptables-restore; reads the same tables through nfnetlink.

    `ipv6` False: no pod will need IPv6, and what the node lacks of it is ignored. What is left of IPv6 rules in a
    namespace that has IPv6 is removed all the same.
    """

    name = "iptables"
    outlives = False

    def __init__(self, *, ipv6: bool = True) -> None:
        self._families = tuple(NFPROTO) if ipv6 else (4,)
        self._reader = Reader(_seen, _PLACES)

    def probe(self) -> Support:
        for program in (_PROGRAM[family] for family in self._families):
            if shutil.which(program, path=exec.PATH) is None:
                return Support(False, f"{program} is not installed; install iptables 1.8 with its nft variant")
        try:
            scratch.call(lambda: _commit_sample(self._families))
        except (CommandError, KernelError) as error:
            return Support(False, f"the kernel refused our rules ({error}); it needs nft_compat and xt modules")
        return Support(True)

    def read(self, target: PodNetns) -> XtSeen:
        return self._reader.read(target)

    def plan(self, want: Redirect | None, have: XtSeen) -> Plan[Payload]:
        steps: list[Step[Payload]] = []
        drift: list[str] = []
        create: list[tuple[int, str, str]] = []
        for family, actual in have.held.families.items():
            wanted = rendering.render(want or _NOTHING, family)
            if wanted.tables:
                refuse_taken(actual)
            if same(wanted.tables, actual):
                continue
            drift += differences(family, wanted.tables, actual)
            create += [
                (family, table, base)
                for table, state in wanted.tables.items()
                for base, _, _ in state.jumps
                if base not in actual.get(table, XtTable()).bases
            ]
            script = rendering.script(wanted, actual)
            if script:
                steps.append(Step(f"# {_PROGRAM[family]} --noflush\n{script}".rstrip(), Restore(family, script)))
        if create:
            steps.insert(0, bases.create(create, have.held))
        if not steps:
            steps = list(bases.drop(want, have.held))
        return Plan(tuple(steps), tuple(drift), have.held.generation, have.remarks)

    def apply(self, target: PodNetns, plan: Plan[Payload]) -> None:
        for step in plan.steps:
            if isinstance(step.payload, Restore):
                _restore(step.payload, target)
            else:
                target.nft.commit("nf_tables transaction", step.payload, plan.seen)


def _seen(ruleset: Ruleset, generation: int | None, ipv6: bool) -> XtSeen:
    families = {family: _tables(ruleset, family) for family in (NFPROTO if ipv6 else (4,))}
    remarks = foreign_rules.chains(ruleset, 0, Table.NAT.value, ipv6=ipv6)
    return XtSeen(XtState(families, generation, ruleset.whole), remarks)


def _tables(ruleset: Ruleset, family: int) -> dict[str, XtTable]:
    heads = (head for head in ruleset.tables if head.family == NFPROTO[family])
    return _family(ruleset.content, NFPROTO[family], tuple((head.name, head.comment) for head in heads))


@lru_cache(maxsize=64)
def _family(content: Content, protocol: int, tables: tuple[tuple[str, str], ...]) -> dict[str, XtTable]:
    """Returns the tables of one family, given by name and comment, with what they hold."""
    heads = [
        Message(kind=0, flags=0, sequence=0, port=0, body=wire.NFGENMSG.pack(protocol, 0, 0) + name + comment)
        for name, comment in (
            (attribute(wire.Table.NAME, name), attribute(wire.Table.USERDATA, comment_data(mark)))
            for name, mark in tables
        )
    ]
    chains, rules = ([m for m in part if m.body[0] == protocol] for part in (content.chains, content.rules))
    return reading.family_tables(heads, chains, rules)


def _restore(step: Restore, target: PodNetns | None = None) -> None:
    within = target.netns if target else None
    exec.run([_PROGRAM[step.family], "--noflush"], stdin=step.script, within=within, seconds=10)


def _commit_sample(families: tuple[int, ...]) -> None:
    """Commits every rule of every variant, in a namespace of its own."""
    sample = Redirect(virtual_interfaces=("lo",))
    for family in families:
        _restore(Restore(family, rendering.script(rendering.render(sample, family), {})))

# SPDX-License-Identifier: Apache-2.0
"""The probe exemption in a table of our own: rules and sets changed in one transaction, owned where the kernel can."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from agent.backends.base import Support
from agent.backends.hostprobes import nft_rendering, nft_sets
from agent.backends.hostprobes.nft_rendering import TABLE
from agent.backends.hostprobes.nft_sets import SetState
from agent.backends.hostprobes.want import SETS, HostProbes, change, settled
from agent.backends.netfilter import dumps
from agent.backends.nftables import reading
from agent.backends.nftables.backend import NftPlan, try_owned
from agent.backends.nftables.rendering import OWNED, delete_commands, table_command
from agent.backends.nftables.ruleset import TableState, differences
from agent.core import names
from agent.core.errors import KernelError
from agent.core.model.plan import Plan, Step
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import Message, attribute
from agent.core.wire.nftables import GETCHAIN, GETRULE, GETSET, GETSETELEM, GETTABLE, NFPROTO_INET, Command, TableFlag
from agent.kernel import scratch
from agent.kernel.host_netns import HostNetns
from agent.kernel.netlink.nf_tables import NftSocket

_NO_MEMBERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class HostNftState:
    """Our table on the host, None when it is not there, and its sets; all of one generation."""

    table: TableState | None
    sets: tuple[SetState, ...]
    generation: int

    def members(self, family: int) -> Mapping[str, str]:
        members = (state.members for state in self.sets if state == nft_sets.wanted(family))
        return next(members, _NO_MEMBERS)


class NftHostProbes:
    """Four verbs. `owned`: the table carries OWNER and PERSIST; `probe` finds out if it can."""

    name = "nftables"

    def __init__(self, owned: bool = False) -> None:
        self.owned = owned

    def probe(self) -> Support:
        try:
            self.owned = scratch.call(try_owned)
            scratch.call(lambda: _commit_sample(self._flags))
        except KernelError as error:
            needs = "it needs nf_tables, inet nat and nft_meta, 5.2"
            return Support(False, f"the kernel refused the table of the node's probes ({error}); {needs}")
        return Support(True, remarks=("the table is owned" if self.owned else "this kernel has no owned tables",))

    def read(self, target: HostNetns) -> HostNftState:
        return read(target.nft)

    def plan(self, want: HostProbes | None, have: HostNftState) -> NftPlan:
        if want is None:
            return self._removal(have)
        differences = (*self._wrong(want, have), *_wrong_sets(want, have))
        if differences:
            return self._anew(want, have, differences)
        changes = [(SETS[family], change(want, family, have.members(family))) for family in want.families]
        lines = list[str]()
        commands = list[Command]()
        descriptions = list[str]()
        for name, one in changes:
            gone = (*one.removed, *one.renamed)
            come = {**one.added, **one.renamed}
            lines += [f"delete element inet {TABLE} {name} {{ {', '.join(gone)} }}"] if gone else []
            shown = ", ".join(nft_sets.element(*member) for member in come.items())
            lines += [f"add element inet {TABLE} {name} {{ {shown} }}"] if come else []
            commands += [*nft_sets.removed(TABLE, name, gone), *nft_sets.added(TABLE, name, come)]
            descriptions += [one.words(name)] if one else []
        if have.table and self.owned and have.table.flags & OWNED == TableFlag.PERSIST:
            lines.insert(0, f"# take over the ownership of table inet {TABLE}")
            commands.insert(0, table_command(TABLE, self._flags))
        steps = (Step("\n".join(lines), tuple(commands)),) if commands else ()
        return Plan(steps, tuple(descriptions), have.generation)

    @property
    def _flags(self) -> int:
        return OWNED if self.owned else 0

    def _removal(self, have: HostNftState) -> NftPlan:
        if have.table is None:
            return Plan(seen=have.generation)
        step = Step(f"delete table inet {TABLE}", tuple(delete_commands((TABLE,))))
        return Plan((step,), (f"table inet {TABLE} is not wanted",), have.generation)

    def _wrong(self, want: HostProbes, have: HostNftState) -> Iterator[str]:
        yield from differences((nft_rendering.state(want),), (have.table,) if have.table else ())
        # PERSIST cannot be given to an existing table: one replacement gives it both flags.
        if have.table and self.owned and not have.table.flags & OWNED:
            yield f"table inet {TABLE} is not protected by an owner"

    def _anew(self, want: HostProbes, have: HostNftState, differences: tuple[str, ...]) -> NftPlan:
        """Returns the table with all that its sets have to hold, in the transaction that takes the old one away."""
        members = {family: settled(want, family, have.members(family)) for family in want.families}
        before = self._removal(have).steps
        script = [*(step.text for step in before), nft_rendering.script(want, members)]
        commands = [command for step in before for command in step.payload]
        commands += nft_rendering.commands(want, self._flags, members)
        return Plan((Step("\n".join(script), tuple(commands)),), differences, have.generation)

    def apply(self, target: HostNetns, plan: NftPlan) -> None:
        for step in plan.steps:
            target.nft.commit("nf_tables transaction on the host", step.payload, plan.seen)


def _wrong_sets(want: HostProbes, have: HostNftState) -> Iterator[str]:
    if have.table is None:
        return
    wanted = {SETS[family]: nft_sets.wanted(family) for family in want.families}
    actual = {state.name: state for state in have.sets}
    for name in sorted({*wanted, *actual}):
        if wanted.get(name) != actual.get(name):
            what = "missing" if name not in actual else "of another type" if name in wanted else "not wanted"
            yield f"set {TABLE} {name} is {what}"


def read(nft: NftSocket) -> HostNftState:
    """Reads only Sluice's table: a node may have thousands of other rules."""
    of_table = attribute(wire.Chain.TABLE, TABLE)
    for _ in range(20):
        generation = nft.generation()
        table = nft.get(GETTABLE, NFPROTO_INET, attribute(wire.Table.NAME, TABLE))
        if not table:
            return HostNftState(None, (), generation)
        chains, _ = nft.dumped(GETCHAIN, NFPROTO_INET)
        rules, _ = nft.dumped(GETRULE, NFPROTO_INET, of_table)
        sets = nft.dump(GETSET, NFPROTO_INET, of_table)
        elements = list[Message]()
        for state in nft_sets.states(sets, ()):
            elements += nft.dump(GETSETELEM, NFPROTO_INET, of_table + attribute(wire.SetElemList.SET, state.name))
        if nft.generation() == generation:
            (own,) = reading.table_states(dumps.ruleset(table, chains, rules))
            return HostNftState(own, nft_sets.states(sets, elements), generation)
    raise KernelError("read nf_tables of the host", 0, "another process keeps changing the rules while they are read")


def _commit_sample(flags: int) -> None:
    sample = HostProbes(
        {"192.0.2.1": "a", "2001:db8::1": "b"}, probe_ipv4=names.PROBE_IPV4, probe_ipv6=names.PROBE_IPV6
    )
    members = {family: sample.of(family) for family in sample.families}
    with contextlib.closing(NftSocket()) as nft:
        nft.commit("try the rules", list(nft_rendering.commands(sample, flags, members)), None)

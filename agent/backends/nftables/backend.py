# SPDX-License-Identifier: Apache-2.0
"""The nftables backend: reads a pod's tables, replaces them in one transaction, owns them where it can."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from agent.backends.base import Support
from agent.backends.netfilter import foreign_rules
from agent.backends.netfilter.dumps import Ruleset
from agent.backends.netfilter.rules import Table
from agent.backends.netfilter.ruleset_reader import Reader
from agent.backends.nftables import reading
from agent.backends.nftables.reading import NftState
from agent.backends.nftables.rendering import (
    OWNED,
    TABLES,
    delete_commands,
    render,
    table_command,
)
from agent.backends.nftables.ruleset import TableState, differences
from agent.core import names
from agent.core.errors import KernelError
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.core.wire.nftables import NFPROTO_INET, Command, TableFlag
from agent.kernel import scratch
from agent.kernel.netlink.nf_tables import NftSocket
from agent.kernel.pod_netns import PodNetns

_NAT = names.NFT_TABLE_PREFIX + Table.NAT.value
NftPlan = Plan[tuple[Command, ...]]


class NftablesBackend:
    """Four verbs over nf_tables. `owned`: tables carry OWNER and PERSIST; `probe` finds out if they can.

    `ipv6` False: no pod will need IPv6, and what the kernel lacks of it is ignored.
    """

    name = "nftables"
    outlives = False

    def __init__(self, owned: bool = False, *, ipv6: bool = True) -> None:
        self.owned = owned
        self._ipv6 = ipv6
        self._reader = Reader(_have, reading.PLACES)

    def probe(self) -> Support:
        try:
            self.try_ownership()
            scratch.call(lambda: _commit_sample(self.owned, self._ipv6))
        except KernelError as error:
            return Support(False, f"the kernel refused our tables ({error}); it needs nf_tables and inet nat, 5.2")
        remark = "tables are owned" if self.owned else "this kernel has no owned tables (needs 6.9)"
        return Support(True, remarks=(remark,))

    def try_ownership(self) -> None:
        """Sets `owned` by what this kernel can do; takes a millisecond. Raises KernelError."""
        self.owned = scratch.call(try_owned)

    def read(self, target: PodNetns) -> NftState:
        return self._reader.read(target)

    def plan(self, want: Redirect | None, have: NftState) -> NftPlan:
        present = tuple(table.name for table in have.tables)
        if want is None:
            commands = tuple(delete_commands(present))
            script = "\n".join(f"delete table inet {name}" for name in present)
            drift = tuple(f"table inet {name} is not wanted" for name in present)
            return Plan((Step(script, commands),) if commands else (), drift, have.generation, have.remarks)
        rendering = render(want, self.owned)
        drift = tuple(differences(rendering.tables, have.tables))
        if not drift and not any(self._unowned(table) for table in have.tables):
            return self._adopt(have)
        drift = drift or ("the tables are not protected by an owner",)
        script = "".join(f"delete table inet {name}\n" for name in present) + rendering.text
        return Plan(
            (Step(script, (*delete_commands(present), *rendering.commands)),), drift, have.generation, have.remarks
        )

    def _unowned(self, table: TableState) -> bool:
        # PERSIST cannot be given to an existing table; one replacement gives it both flags.
        return self.owned and not table.flags & OWNED

    def _adopt(self, have: NftState) -> NftPlan:
        """Rules are right: at most the ownership that our predecessor left behind is taken over."""
        orphans = [t.name for t in have.tables if self.owned and t.flags & OWNED == TableFlag.PERSIST]
        if not orphans:
            return Plan(seen=have.generation, remarks=have.remarks)
        script = "\n".join(f"# take over the ownership of table inet {name}" for name in orphans)
        commands = tuple(table_command(name, OWNED) for name in orphans)
        return Plan((Step(script, commands),), seen=have.generation, remarks=have.remarks)

    def apply(self, target: PodNetns, plan: NftPlan) -> None:
        for step in plan.steps:
            target.nft.commit("nf_tables transaction", step.payload, plan.seen)


def _have(ruleset: Ruleset, generation: int | None, ipv6: bool) -> NftState:
    remarks = foreign_rules.chains(ruleset, NFPROTO_INET, _NAT, ipv6=ipv6)
    return NftState(reading.table_states(ruleset), generation, remarks)


def try_owned() -> bool:
    """Returns True if the kernel takes owned tables. In a scratch namespace."""
    try:
        with contextlib.closing(NftSocket()) as nft:
            nft.commit("try table flags", [table_command(TABLES[0], OWNED)], None)
    except KernelError:
        return False
    return True


def _commit_sample(owned: bool, ipv6: bool) -> None:
    """Tries every expression that any variant uses, in a namespace of its own."""
    sample = Redirect(virtual_interfaces=("lo",))
    with contextlib.closing(NftSocket()) as nft:
        nft.commit("try the rules without IPv6", render(replace(sample, ipv6=False), owned).commands, None)
        if ipv6:
            nft.commit("try the rules", [*delete_commands(TABLES), *render(sample, owned).commands], None)

"""The nftables backend: reads a pod's tables, replaces them in one transaction, owns them where it can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from agent.backends.base import Support
from agent.backends.nfmessages import text
from agent.backends.nftables import reading
from agent.backends.nftables.reading import Have
from agent.backends.nftables.rendering import (
    OWNER,
    PERSIST,
    TABLES,
    delete_commands,
    render,
    table_command,
)
from agent.backends.nftables.ruleset import TableState, differences
from agent.core.errors import KernelError
from agent.core.netlink import attributes
from agent.core.nftables import GETCHAIN, GETRULE, GETTABLE, NFPROTO_INET, Command
from agent.core.plan import Plan, Step
from agent.core.redirect import Redirect
from agent.kernel import scratch
from agent.kernel.nfnetlink import NftSocket
from agent.kernel.podnetns import PodNetns

NftPlan = Plan[tuple[Command, ...]]


class NftablesBackend:
    """Five verbs over nf_tables. `owned`: tables carry OWNER and PERSIST; `probe` finds out if they can."""

    name = "nftables"

    def __init__(self, owned: bool = False) -> None:
        self.owned = owned

    def probe(self) -> Support:
        try:
            self.owned = scratch.call(_try_owned)
            scratch.call(lambda: _commit_sample(self.owned))
        except KernelError as error:
            return Support(False, f"the kernel refused our tables ({error}); it needs nf_tables and inet nat, 5.2")
        remark = "tables are owned" if self.owned else "this kernel has no owned tables (needs 6.9)"
        return Support(True, remarks=(remark,))

    def targets(self, desired: Mapping[PodNetns, Redirect | None]) -> Mapping[PodNetns, Redirect | None]:
        return desired

    def read(self, target: PodNetns) -> Have:
        return read(target.nft)

    def plan(self, want: Redirect | None, have: Have) -> NftPlan:
        present = tuple(table.name for table in have.tables)
        if want is None:
            commands = tuple(delete_commands(present))
            script = "\n".join(f"delete table inet {name}" for name in present)
            found = tuple(f"table inet {name} is not wanted" for name in present)
            return Plan((Step(script, commands),) if commands else (), found, have.generation)
        rendering = render(want, self.owned)
        found = tuple(differences(rendering.tables, have.tables))
        if not found and not any(self._unowned(table) for table in have.tables):
            return self._adopt(have)
        found = found or ("the tables are not protected by an owner",)
        script = "".join(f"delete table inet {name}\n" for name in present) + rendering.text
        return Plan((Step(script, (*delete_commands(present), *rendering.commands)),), found, have.generation)

    def _unowned(self, table: TableState) -> bool:
        # PERSIST cannot be given to an existing table; one replacement gives it both flags.
        return self.owned and not table.flags & (OWNER | PERSIST)

    def _adopt(self, have: Have) -> NftPlan:
        """Rules are right: at most the ownership that our predecessor left behind is taken over."""
        orphans = [t.name for t in have.tables if self.owned and t.flags & (OWNER | PERSIST) == PERSIST]
        if not orphans:
            return Plan(seen=have.generation)
        script = "\n".join(f"# take over the ownership of table inet {name}" for name in orphans)
        commands = tuple(table_command(name, OWNER | PERSIST) for name in orphans)
        return Plan((Step(script, commands),), seen=have.generation)

    def apply(self, target: PodNetns, plan: NftPlan) -> None:
        for step in plan.steps:
            target.nft.commit("nf_tables transaction", step.payload, plan.seen)


def read(nft: NftSocket) -> Have:
    """Our tables in the namespace of this socket, all read within one generation."""
    for _ in range(20):
        generation = nft.generation()
        present = [message for message in nft.dump(GETTABLE, NFPROTO_INET) if table_name(message.body) in TABLES]
        chains = nft.dump(GETCHAIN, NFPROTO_INET) if present else []
        rules = nft.dump(GETRULE, NFPROTO_INET) if present else []
        # Each message of a dump carries the low half of the generation that it shows.
        if all(message.body[2:4] == generation.to_bytes(4)[2:] for message in (*present, *chains, *rules)):
            return Have(reading.tables(present, chains, rules), generation, nft.port)
    raise KernelError("read nf_tables", 0, "somebody keeps changing the rules while they are read")


def table_name(body: bytes) -> str:
    return text(dict(attributes(body[4:])).get(1))


def _try_owned() -> bool:
    nft = NftSocket()
    try:
        nft.commit("try table flags", [table_command(TABLES[0], OWNER | PERSIST)], None)
        return True
    except KernelError:
        return False
    finally:
        nft.close()


def _commit_sample(owned: bool) -> None:
    """Every expression that any variant uses, in a namespace that nobody else sees."""
    sample = Redirect(virtual_interfaces=("lo",))
    nft = NftSocket()
    try:
        nft.commit("try the rules", render(sample, owned).commands, None)
        nft.commit("try the rules without IPv6", _replacing(replace(sample, ipv6=False), owned), None)
    finally:
        nft.close()


def _replacing(redirect: Redirect, owned: bool) -> list[Command]:
    return [*delete_commands(TABLES), *render(redirect, owned).commands]

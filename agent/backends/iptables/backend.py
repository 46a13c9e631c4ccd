"""The iptables backend (nf_tables variant): at most one process per family and change, none to compare."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from agent.backends.base import Support
from agent.backends.iptables import bases, reading, rendering
from agent.backends.iptables.bases import FAMILIES, Payload, Restore
from agent.backends.iptables.comparison import differences
from agent.backends.iptables.reading import Have
from agent.backends.iptables.rendering import XtTable
from agent.core.errors import CommandError, KernelError
from agent.core.nftables import GETCHAIN, GETRULE, GETTABLE
from agent.core.plan import Plan, Step
from agent.core.redirect import Redirect
from agent.kernel import exec, scratch
from agent.kernel.nfnetlink import NftSocket
from agent.kernel.podnetns import PodNetns

_PROGRAM = {4: "iptables-nft-restore", 6: "ip6tables-nft-restore"}


class IptablesBackend:
    """Five verbs over iptables-restore; reads the same tables through nfnetlink."""

    name = "iptables"

    def probe(self) -> Support:
        for program in _PROGRAM.values():
            if shutil.which(program, path=exec.PATH) is None:
                return Support(False, f"{program} is not installed; install iptables 1.8 with its nft variant")
        try:
            scratch.call(_commit_sample)
        except (CommandError, KernelError) as error:
            return Support(False, f"the kernel refused our rules ({error}); it needs nft_compat and xt modules")
        return Support(True)

    def targets(self, desired: Mapping[PodNetns, Redirect | None]) -> Mapping[PodNetns, Redirect | None]:
        return desired

    def read(self, target: PodNetns) -> Have:
        return read(target.nft)

    def plan(self, want: Redirect | None, have: Have) -> Plan[Payload]:
        steps: list[Step[Payload]] = []
        found: list[str] = []
        create: list[tuple[int, str, str]] = []
        for family in FAMILIES:
            actual = have.families[family]
            wanted = rendering.render(want or Redirect(ipv4=False, ipv6=False), family)
            found += differences(family, wanted.tables, actual)
            create += [
                (family, table, base)
                for table, state in wanted.tables.items()
                for base, _, _ in state.jumps
                if base not in actual.get(table, XtTable()).bases
            ]
            script = rendering.script(family, wanted, actual)
            if script:
                steps.append(Step(f"# {_PROGRAM[family]} --noflush\n{script}".rstrip(), Restore(family, script)))
        if create:
            steps.insert(0, bases.create(create, have))
        if not steps:
            steps = list(bases.drop(want, have))
        return Plan(tuple(steps), tuple(found), have.generation)

    def apply(self, target: PodNetns, plan: Plan[Payload]) -> None:
        for step in plan.steps:
            if isinstance(step.payload, Restore):
                _restore(step.payload, target)
            else:
                target.nft.commit("nf_tables transaction", step.payload, plan.seen)


def read(nft: NftSocket) -> Have:
    """All tables of iptables in the namespace of this socket, read within one generation."""
    for _ in range(20):
        generation = nft.generation()
        families, seen = {}, set()
        for family, protocol in FAMILIES.items():
            tables = nft.dump(GETTABLE, protocol)
            chains = nft.dump(GETCHAIN, protocol) if tables else []
            rules = nft.dump(GETRULE, protocol) if tables else []
            families[family] = reading.family_tables(tables, chains, rules)
            seen |= {message.body[2:4] for message in (*tables, *chains, *rules)}
        # Each message of a dump carries the low half of the generation that it shows.
        if seen <= {generation.to_bytes(4)[2:]}:
            return Have(families, generation)
    raise KernelError("read iptables", 0, "somebody keeps changing the rules while they are read")


def _restore(step: Restore, target: PodNetns | None = None) -> None:
    within = target.netns if target else None
    exec.run([_PROGRAM[step.family], "--noflush"], stdin=step.script, within=within, seconds=10)


def _commit_sample() -> None:
    """Every rule of every variant, in a namespace that nobody else sees."""
    sample = Redirect(virtual_interfaces=("lo",))
    for family in FAMILIES:
        _restore(Restore(family, rendering.script(family, rendering.render(sample, family), {})))

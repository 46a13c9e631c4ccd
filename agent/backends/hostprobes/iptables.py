"""The probe exemption by iptables rules, for hosts that translate by either variant of it. Their sets are xt_sets."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from agent.backends.base import Support
from agent.backends.hostprobes import xt_base, xt_reading, xt_rendering
from agent.backends.hostprobes.want import HostProbes
from agent.backends.hostprobes.xt_rendering import TABLE, Held
from agent.backends.hostprobes.xt_sets import IpsetHostProbes
from agent.core import names
from agent.core.errors import CommandError, KernelError
from agent.core.nftables import Command
from agent.core.plan import Plan, Step
from agent.kernel import exec, scratch, xtables
from agent.kernel.hostnetns import HostNetns

FAMILIES = (4, 6)
_MOVES = 3  # how often our jump is put first again before whoever puts his there is given way


@dataclass(frozen=True, slots=True)
class Restore:
    """Input of one iptables-restore --noflush; `moves` our jump, which was there, to the first place."""

    family: int
    script: str
    moves: bool


Payload = Restore | tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Have:
    """Per family (4, 6) our part of nat. `generation` is None for legacy tables."""

    held: Mapping[int, Held]
    generation: int | None


class _IptablesHostProbes:
    """Five verbs; a variant brings the programs and the reading of tables."""

    name = ""
    programs: ClassVar[Mapping[int, Sequence[str]]]

    def __init__(self) -> None:
        self._moved = 0

    def probe(self) -> Support:
        for program, *_ in self.programs.values():
            if shutil.which(program, path=exec.PATH) is None:
                return Support(False, f"{program} is not installed; install iptables 1.8")
        try:
            scratch.call(self._try)
        except (CommandError, KernelError) as error:
            needs = "it needs ip_set_hash_ip, xt_set, xt_owner and xt_nat"
            return Support(False, f"the kernel refused the rule of the node's probes ({error}); {needs}")
        return Support(True)

    def targets(self, desired: Mapping[HostNetns, HostProbes | None]) -> Mapping[HostNetns, HostProbes | None]:
        return desired

    def read(self, target: HostNetns) -> Have:
        raise NotImplementedError

    def plan(self, want: HostProbes | None, have: Have) -> Plan[Payload]:
        found, restores = list[str](), list[Step[Payload]]()
        for family in FAMILIES:
            wanted = want if want and family in want.families else None
            words = list(xt_rendering.differences(family, wanted, have.held[family], anywhere=self._moved >= _MOVES))
            if words:
                restores.append(self._restore_step(family, wanted, have.held[family]))
                found += words
        if have.generation is None:
            return Plan(tuple(restores), tuple(found))
        kept = want.families if want else ()
        bases = xt_base.create([family for family in kept if not have.held[family].base])
        ends = xt_base.drop([family for family in FAMILIES if family not in kept], have.held) if not restores else ()
        return Plan((*bases, *restores, *ends), tuple(found), have.generation)

    def _restore_step(self, family: int, want: HostProbes | None, held: Held) -> Step[Payload]:
        script = xt_rendering.script(family, want, held)
        moves = want is not None and bool(held.jumps) and held.jumps[0][0] > 1
        return Step(f"# {' '.join(self.programs[family])}\n{script}".rstrip(), Restore(family, script, moves))

    def apply(self, target: HostNetns, plan: Plan[Payload]) -> None:
        for step in plan.steps:
            payload = step.payload
            if isinstance(payload, Restore):
                self._moved += payload.moves
                exec.run(self.programs[payload.family], stdin=payload.script, within=target.door, seconds=10)
            else:
                target.nft.commit("nf_tables transaction on the host", payload, plan.seen)

    def _try(self) -> None:
        """The rules of both families, in a namespace that nobody else sees, and whether they read as written."""
        target, sets = HostNetns(), IpsetHostProbes()
        try:
            sample = HostProbes({}, names.PROBE_IPV4, names.PROBE_IPV6).within(ipv6=target.has_ipv6())
            sets.apply(target, sets.plan(sample, sets.read(target)))
            self.apply(target, self.plan(sample, self.read(target)))
            for words in self.plan(sample, self.read(target)).differences:
                raise KernelError("try the rules", 0, f"they are not read as they were written: {words}")
        finally:
            target.close()


class NftVariantHostProbes(_IptablesHostProbes):
    """iptables-nft: read through nfnetlink, without a process."""

    name = "iptables"
    programs: ClassVar = {4: ("iptables-nft-restore", "--noflush"), 6: ("ip6tables-nft-restore", "--noflush")}

    def read(self, target: HostNetns) -> Have:
        return Have(*xt_base.read(target.nft))


class LegacyHostProbes(_IptablesHostProbes):
    """iptables-legacy: read by socket options, and only tables that the kernel lists. The node's own lock is used."""

    name = "iptables-legacy"
    programs: ClassVar = {
        4: ("iptables-legacy-restore", "--noflush", "-w", "5"),
        6: ("ip6tables-legacy-restore", "--noflush", "-w", "5"),
    }

    def read(self, target: HostNetns) -> Have:
        found = target.call(lambda: xtables.read((TABLE,), ()))
        held = {family: [xt_reading.legacy_held(family, *raw) for raw in found[family].values()] for family in FAMILIES}
        return Have({family: one[0] if one else Held() for family, one in held.items()}, None)

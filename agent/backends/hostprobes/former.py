# SPDX-License-Identifier: Apache-2.0
"""Removes the probe exemption in its former forms: iptables rules of either variant, and the ipset sets they match.

Earlier versions wrote these forms, and istio-cni does. Nothing here makes them; the layers go after one release.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from agent.backends.base import Support
from agent.backends.hostprobes.former_reading import BASE, CHAIN, TABLE, Held, legacy_held, nft_held
from agent.backends.hostprobes.want import SETS, HostProbes
from agent.backends.iptables.bases import WORD, Payload, Restore
from agent.core.errors import KernelError
from agent.core.model.plan import Plan, Step
from agent.core.wire import nftables as wire
from agent.core.wire.netlink import Message, attribute
from agent.core.wire.nftables import (
    DELCHAIN,
    DELTABLE,
    GETCHAIN,
    GETRULE,
    GETTABLE,
    NFPROTO,
    Command,
)
from agent.kernel import exec, xtables
from agent.kernel.host_netns import HostNetns
from agent.kernel.netlink.ipset import IpSet, IpsetSocket
from agent.kernel.netlink.nf_tables import NftSocket

_IPSET = Path("/sys/module/ip_set")  # also of a kernel that has it built in: it has a parameter


@dataclass(frozen=True, slots=True)
class FormerState:
    """Per family (4, 6) our part of nat. `generation` is None for legacy tables."""

    held: Mapping[int, Held]
    generation: int | None


class _FormerRules:
    """The four verbs over chain ISTIO_POSTRT; a variant brings the programs and the reading of tables."""

    name = ""
    programs: ClassVar[Mapping[int, Sequence[str]]]

    def probe(self) -> Support:
        return Support(True)

    def read(self, target: HostNetns) -> FormerState:
        raise NotImplementedError

    def plan(self, want: HostProbes | None, have: FormerState) -> Plan[Payload]:
        """Returns the removal, for any `want`. Tables and base chains that Sluice made go once they are empty."""
        own = {family: held for family, held in have.held.items() if held.ours}
        differences = tuple(f"{WORD[family]}tables -t {TABLE}: chain {CHAIN} is not wanted" for family in own)
        if own or have.generation is None:
            return Plan(tuple(self._removal(*one) for one in own.items()), differences, have.generation)
        return Plan(_emptied(have.held), differences, have.generation)

    def _removal(self, family: int, held: Held) -> Step[Payload]:
        comments = (f'-m comment --comment "{tag}" ' if tag else "" for tag in held.jumps)
        jumps = [f"-D {BASE} {comment}-j {CHAIN}" for comment in comments]
        chain = [f"-F {CHAIN}", f"-X {CHAIN}"] if held.chain is not None else []
        script = "\n".join([f"*{TABLE}", *jumps, *chain, "COMMIT", ""])
        return Step(f"# {' '.join(self.programs[family])}\n{script}".rstrip(), Restore(family, script))

    def apply(self, target: HostNetns, plan: Plan[Payload]) -> None:
        for step in plan.steps:
            payload = step.payload
            if isinstance(payload, Restore):
                exec.run(self.programs[payload.family], stdin=payload.script, within=target.door, seconds=10)
            else:
                target.nft.commit("nf_tables transaction on the host", payload, plan.seen)


class FormerNftVariantRules(_FormerRules):
    """iptables-nft: read through nfnetlink, without a process."""

    name = "iptables"
    programs: ClassVar = {4: ("iptables-nft-restore", "--noflush"), 6: ("ip6tables-nft-restore", "--noflush")}

    def read(self, target: HostNetns) -> FormerState:
        return FormerState(*_read(target.nft))


class FormerLegacyRules(_FormerRules):
    """iptables-legacy: read by socket options, and only tables that the kernel lists. The node's own lock is used."""

    name = "iptables-legacy"
    programs: ClassVar = {
        4: ("iptables-legacy-restore", "--noflush", "-w", "5"),
        6: ("ip6tables-legacy-restore", "--noflush", "-w", "5"),
    }

    def read(self, target: HostNetns) -> FormerState:
        tables = target.call(lambda: xtables.read((TABLE,), ()))
        held = {family: [legacy_held(family, *raw) for raw in tables[family].values()] for family in NFPROTO}
        return FormerState({family: one[0] if one else Held() for family, one in held.items()}, None)


class FormerSets:
    """The four verbs over the two sets. They come before the rules: a set that a rule refers to cannot be destroyed."""

    name = "ipset"

    def probe(self) -> Support:
        return Support(True)

    def read(self, target: HostNetns) -> tuple[IpSet, ...]:
        return former_sets(target.ipset)

    def plan(self, want: HostProbes | None, have: Sequence[IpSet]) -> Plan[str]:
        steps = tuple(Step(f"destroy {one.name}", one.name) for one in have)
        return Plan(steps, tuple(f"set {one.name} is not wanted" for one in have))

    def apply(self, target: HostNetns, plan: Plan[str]) -> None:
        for step in plan.steps:
            target.ipset.destroy(step.payload)


def former_sets(ipset: IpsetSocket) -> tuple[IpSet, ...]:
    """Returns Sluice's sets; one of another type is foreign. Empty without ipset in the kernel."""
    if not _IPSET.is_dir():  # the question itself would load it
        return ()
    sets = ((family, ipset.read(name)) for family, name in SETS.items())
    return tuple(one for family, one in sets if one and (one.kind, one.family) == ("hash:ip", family))


def _read(nft: NftSocket) -> tuple[dict[int, Held], int]:
    """Reads both families within one generation, which is returned too. Foreign chains are not read."""
    for _ in range(20):
        generation = nft.generation()
        seen = list[Message]()
        held = dict[int, Held]()
        for family, protocol in NFPROTO.items():
            tables = nft.dump(GETTABLE, protocol, attribute(wire.Table.NAME, TABLE), 0)
            if not tables:
                held[family] = Held()
                continue
            chains = {
                name: nft.dump(GETCHAIN, protocol, _selection(wire.Chain.NAME, name), 0) for name in (BASE, CHAIN)
            }
            there = [name for name, messages in chains.items() if messages]
            rules = [m for name in there for m in nft.dump(GETRULE, protocol, _selection(wire.Rule.CHAIN, name))]
            base = [wire.fields(message.body) for message in chains[BASE]]
            table = wire.fields(tables[0].body)
            held[family] = nft_held(table, base[0] if base else None, CHAIN in there, rules)
            seen += [*tables, *(m for messages in chains.values() for m in messages), *rules]
        # Each message carries the low half of the generation that it shows.
        if {message.body[2:4] for message in seen} <= {generation.to_bytes(4)[2:]}:
            return held, generation
    raise KernelError("read iptables of the host", 0, "the rules keep changing while they are read")


def _emptied(have: Mapping[int, Held]) -> tuple[Step[Payload], ...]:
    """Returns one transaction that deletes Sluice's tables and base chains in which nothing is left."""
    lines = list[str]()
    commands = list[Command]()
    for family, held in have.items():
        if held.bare:
            lines.append(f"delete table {WORD[family]} {TABLE}")
            commands.append(Command(DELTABLE, 0, NFPROTO[family], attribute(wire.Table.NAME, TABLE)))
        elif held.idle:
            lines.append(f"delete chain {WORD[family]} {TABLE} {BASE}")
            commands.append(Command(DELCHAIN, 0, NFPROTO[family], _selection(wire.Chain.NAME, BASE)))
    return (Step("\n".join(lines), tuple(commands)),) if commands else ()


def _selection(kind: int, chain: str) -> bytes:
    return attribute(wire.Chain.TABLE, TABLE) + attribute(kind, chain)

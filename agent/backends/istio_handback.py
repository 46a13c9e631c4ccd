# SPDX-License-Identifier: Apache-2.0
"""Captured pods in the exact form in which istio-cni would have programmed them, so that it finds nothing to do.

From our rules, which are right (settle comes before), one transaction per set of tables: what a packet meets is the
same before and after, and at no moment nothing. The mark's policy rule and route stay: those of the usual form do what
istio-cni's do, and where table 100 is the pod's own, istio-cni would overwrite it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agent.backends import routing
from agent.backends.iptables import rendering as xtables
from agent.backends.iptables.bases import WORD, Restore
from agent.backends.iptables.rendering import ORDER, XtTable
from agent.backends.nftables import rendering as nftables
from agent.core.errors import KernelError
from agent.core.model.exclusions import NOTHING
from agent.core.model.plan import Plan, Step
from agent.core.model.redirect import Redirect
from agent.kernel import exec
from agent.kernel.pod_netns import PodNetns

_SAVE = {"iptables": "tables-nft-save", "iptables-legacy": "tables-legacy-save"}
RuleNumbers = Mapping[tuple[int, str, str], int]  # family, table, tag -> number of the rule in its chain, from 1


def known_to_peers(want: Redirect) -> tuple[Redirect, tuple[str, ...]]:
    """Returns the intent as far as istio-cni can express it, and in words the rest."""
    plain = replace(want, dns_to=(), exclude=NOTHING, refuse_non_tcp=False, preserve=False)
    lost = {
        "exclusions": want.exclude != NOTHING,
        "the resolvers that DNS is captured towards": bool(want.dns_to),
        "the refusal of other than TCP": want.refuse_non_tcp,
    }
    return plain, tuple(f"istio-cni does not know {feature}: given up" for feature, there in lost.items() if there)


def rule_numbers(target: PodNetns, layer: str) -> RuleNumbers:
    """Returns the places of our jumps: a replacement takes its place among foreign rules. Raises CommandError."""
    if layer not in _SAVE:
        return {}
    numbers: dict[tuple[int, str, str], int] = {}
    for family in (4, 6) if target.has_ipv6() else (4,):
        table = ""
        counts = dict[str, int]()
        for line in exec.run([WORD[family] + _SAVE[layer]], within=target.netns).stdout.splitlines():
            if line.startswith("*"):
                table = line[1:]
                counts = {}
            elif line.startswith("-A "):
                chain = line.split()[1]
                counts[chain] = counts.get(chain, 0) + 1
                for tag in (word.strip('"') for word in line.split() if word.startswith(('"sluice:', "sluice:"))):
                    numbers.setdefault((family, table, tag), counts[chain])
    return numbers


def plan(layer: str, want: Redirect, have: Any, numbers: RuleNumbers) -> Plan[Any]:
    """Returns the plan that turns rules of `want`, read as `have`, into those of istio-cni; empty when they are."""
    if layer == "nftables":
        return _nftables(want, have)
    if layer == "routing":
        return routing.plain(have)
    held = getattr(have, "held", have)
    steps = []
    for family, actual in held.families.items():
        text = _script(family, want, actual, numbers)
        if text:
            steps.append(Step(f"# {WORD[family]}tables-restore --noflush\n{text}".rstrip(), Restore(family, text)))
    return Plan(tuple(steps), seen=getattr(held, "generation", None))


def _nftables(want: Redirect, have: Any) -> Plan[Any]:
    rendering = nftables.render(want, owned=False, plain=True)
    if have.tables == rendering.tables:
        return Plan(seen=have.generation)
    present = tuple(table.name for table in have.tables)
    script = "".join(f"delete table inet {name}\n" for name in present) + rendering.text
    commands = (*nftables.delete_commands(present), *rendering.commands)
    return Plan((Step(script, commands),), seen=have.generation)


def _script(family: int, want: Redirect, actual: Mapping[str, XtTable], numbers: RuleNumbers) -> str:
    """Returns the input of iptables-restore --noflush; each table is one transaction."""
    plain = xtables.render(want, family, plain=True)
    lines = list[str]()
    for table in (table.value for table in ORDER if table.value in plain.tables):
        wanted = plain.tables[table]
        held = actual.get(table, XtTable())
        if (wanted.chains, wanted.jumps) == (held.chains, held.jumps):
            continue
        lines += [f"*{table}", *(f":{chain} - [0:0]" for chain, _ in wanted.chains)]
        for base, chain, tag in held.jumps:
            lines.append(f"-R {base} {_number(numbers, family, table, tag)} -j {chain}")
        for chain, _ in wanted.chains:
            lines += plain.lines[table, chain]
        lines.append("COMMIT")
    return "\n".join([*lines, ""]) if lines else ""


def _number(numbers: RuleNumbers, family: int, table: str, tag: str) -> int:
    if (family, table, tag) not in numbers:
        raise KernelError("hand back", 0, f"{WORD[family]}tables-save does not show our jump {tag or 'without a tag'}")
    return numbers[family, table, tag]

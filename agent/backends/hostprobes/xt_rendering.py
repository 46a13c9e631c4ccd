"""HostProbes as iptables rules: what has to be read back, and the scripts for iptables-restore. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from agent.backends.hostprobes.want import SETS, HostProbes
from agent.core import tags

CHAIN: Final = "ISTIO_POSTRT"
BASE: Final = "POSTROUTING"
TABLE: Final = "nat"
WORD = {4: "ip", 6: "ip6"}


@dataclass(frozen=True, slots=True)
class Held:
    """Of one family's nat table: `chain` the tags of our chain's rules, None without a chain.

    `jumps` are (place in POSTROUTING from 1, tag) of jumps to it. `base`: POSTROUTING is there; `idle`: we made it
    and nothing is in it; `bare`: we made the table, and nothing but an idle POSTROUTING is in it.
    """

    chain: tuple[str, ...] | None = None
    jumps: tuple[tuple[int, str], ...] = ()
    base: bool = False
    idle: bool = False
    bare: bool = False

    @property
    def ours(self) -> bool:
        return self.chain is not None or bool(self.jumps)


def wanted(want: HostProbes, family: int) -> Held:
    return Held(_tags(want, family), ((1, _jump_tag(family)),), base=True)


def differences(family: int, want: HostProbes | None, have: Held, *, anywhere: bool) -> Iterator[str]:
    """In words; `anywhere` lets our jump stand behind other rules."""
    place = f"{WORD[family]}tables -t {TABLE}"
    if want is None or family not in want.families:
        if have.ours:
            yield f"{place}: chain {CHAIN} is not wanted"
        return
    right = wanted(want, family)
    if have.chain is None:
        yield f"{place}: chain {CHAIN} is missing"
    elif have.chain != right.chain:
        missing = len(set(right.chain or ()) - set(have.chain))
        yield f"{place}: chain {CHAIN} has {len(have.chain)} rules, {missing} of ours are missing"
    if have.jumps != right.jumps and not (anywhere and [tag for _, tag in have.jumps] == [_jump_tag(family)]):
        places = ", ".join(str(number) for number, _ in have.jumps) or "missing"
        yield f"{place}: the jump from {BASE} to {CHAIN} has to be rule 1, it is {places}"


def script(family: int, want: HostProbes | None, have: Held) -> str:
    """Input of iptables-restore --noflush that puts all of it right."""
    lines = [f"*{TABLE}"]
    if want is not None:
        lines.append(f":{CHAIN} - [0:0]")  # creates the chain or empties it, in the same commit that fills it
    lines += [_jump("-D", tag) for _, tag in have.jumps]
    if want is not None:
        lines.append(_jump("-I", _jump_tag(family)))
        rules = zip(_texts(want, family), _tags(want, family), strict=True)
        lines += [f'-A {CHAIN} -m comment --comment "{tag}" {text}' for text, tag in rules]
    elif have.chain is not None:
        lines += [f"-F {CHAIN}", f"-X {CHAIN}"]
    return "\n".join([*lines, "COMMIT", ""])


def _jump(verb: str, tag: str) -> str:
    place, comment = "1 " if verb == "-I" else "", f'-m comment --comment "{tag}" ' if tag else ""
    return f"{verb} {BASE} {place}{comment}-j {CHAIN}"


def _texts(want: HostProbes, family: int) -> tuple[str, ...]:
    match = f"-p tcp -m owner --socket-exists -m set --match-set {SETS[family]} dst"
    return (f"{match} -j SNAT --to-source {want.probe(family)}",)


def _tags(want: HostProbes, family: int) -> tuple[str, ...]:
    return tags.chain(_texts(want, family), f"{family} {TABLE} {CHAIN}")


def _jump_tag(family: int) -> str:
    (tag,) = tags.chain([f"-j {CHAIN}"], f"{family} {TABLE} {BASE}")
    return tag

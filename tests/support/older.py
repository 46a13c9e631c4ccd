# SPDX-License-Identifier: Apache-2.0
"""Rule sets as former releases wrote them (tests/data/older/RELEASE), put into a pod as their agents did.

A file's sections begin with the program that reads them: `# ip`, `# nft -f`, `# iptables-nft-restore --noflush`.
"""

from __future__ import annotations

import re
from pathlib import Path

from support.rules import Pod, layers

from agent.backends.nftables.backend import NftablesBackend
from agent.backends.nftables.rendering import OWNED, table_command
from agent.kernel.exec import run
from agent.kernel.netlink.nf_tables import NftSocket

DATA = Path(__file__).resolve().parents[1] / "data" / "older"
RELEASES = tuple(sorted(path.name for path in DATA.iterdir()))
_BASE = re.compile(r"^-A (OUTPUT|PREROUTING) .*\n", re.MULTILINE)


def sections(release: str, choice: str, variant: str) -> dict[str, str]:
    text = (DATA / release / f"{choice}.{variant}.txt").read_text()
    heads = re.split(r"^# (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(heads[1::2], heads[2::2], strict=True))


def write(pod: Pod, release: str, choice: str, variant: str = "default") -> None:
    """Into a pod without rules; the tables of nftables are as their agent leaves them when it ends."""
    nftables = layers("nftables")[-1]
    assert isinstance(nftables, NftablesBackend)
    parts = sections(release, choice, variant)
    pod.sh(parts["ip"])
    if choice == "nftables" and nftables.owned:
        tables, parts["nft -f"] = _commands(parts["nft -f"])
        socket = pod.target.netns.call(NftSocket)
        socket.commit("older tables", [table_command(name, OWNED) for name in tables], None)
        socket.close()
    _load(pod, parts)


def _commands(text: str) -> tuple[list[str], str]:
    """The tables, and what they hold as commands of their own: the flag PERSIST refuses a table that is said again."""
    tables, chain, found = list[str](), "", list[str]()
    for line in text.splitlines():
        words = line.split()
        if words[0] == "table":
            tables.append(words[2])
        elif words[0] == "chain":
            chain = f"inet {tables[-1]} {words[1]}"
            found.append(f"add chain {chain}")
        elif words[0] == "type":
            found[-1] += f" {{ {line} }}"
        elif words[0] != "}":
            found.append(f"add rule {chain} {line}")
    return tables, "\n".join([line for line in found if line.startswith("add chain")]
                             + [line for line in found if line.startswith("add rule")])  # fmt: skip


def replace(pod: Pod, release: str, choice: str, variant: str = "default") -> None:
    """In the place of what is there now, as that release does it; our own sockets must be closed.

    It replaced all tables of nf_tables in one transaction; with iptables it refilled its chains and kept the jumps,
    whose tags are the same since then. Routing it found as it wanted it.
    """
    parts = sections(release, choice, variant)
    if choice == "nftables":
        present = re.findall(r"table inet istio-ambient-\S+", pod.sh("nft list tables"))
        parts["nft -f"] = "".join(f"delete {table}\n" for table in present) + parts["nft -f"]
    _load(pod, {program: _BASE.sub("", text) for program, text in parts.items()})


def _load(pod: Pod, parts: dict[str, str]) -> None:
    for program, text in parts.items():
        argv = program.split()
        if argv[0] != "ip":
            run([*argv, "-"] if argv[0] == "nft" else argv, netns=pod.path, stdin=text)

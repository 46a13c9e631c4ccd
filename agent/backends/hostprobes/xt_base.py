"""The nat tables that iptables-nft shares with everybody: reading our part of them, making and dropping their base.

A table or base chain that we make is marked by a comment, and goes again once it is empty.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence

from agent.backends.hostprobes.xt_reading import MARK, nft_held
from agent.backends.hostprobes.xt_rendering import BASE, CHAIN, TABLE, WORD, Held
from agent.backends.nfmessages import comment_data, text
from agent.core.errors import KernelError
from agent.core.netlink import NLM_F_CREATE, Message, attribute, attributes, nested
from agent.core.nftables import (
    DELCHAIN,
    DELTABLE,
    GETCHAIN,
    GETRULE,
    GETTABLE,
    NEWCHAIN,
    NEWTABLE,
    NFPROTO_IPV4,
    NFPROTO_IPV6,
    Command,
)
from agent.core.plan import Step
from agent.kernel.nfnetlink import NftSocket

_PROTOCOL = {4: NFPROTO_IPV4, 6: NFPROTO_IPV6}
_HOOK = nested(4, attribute(1, 4), attribute(2, 100))  # NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC


def read(nft: NftSocket) -> tuple[dict[int, Held], int]:
    """Of both families, within one generation, which is returned too. Chains of others are not asked for."""
    for _ in range(20):
        generation, seen, held = nft.generation(), list[Message](), dict[int, Held]()
        for family, protocol in _PROTOCOL.items():
            tables = [m for m in nft.dump(GETTABLE, protocol) if text(dict(attributes(m.body[4:])).get(1)) == TABLE]
            if not tables:
                held[family] = Held()
                continue
            chains = {name: _chain(nft, protocol, name) for name in (BASE, CHAIN)}
            there = [name for name, found in chains.items() if found]
            rules = [m for name in there for m in nft.dump(GETRULE, protocol, _place(2, name))]
            base = [dict(attributes(message.body[4:])) for message in chains[BASE]]
            table = dict(attributes(tables[0].body[4:]))
            held[family] = nft_held(table, base[0] if base else None, CHAIN in there, rules)
            seen += [*tables, *(m for found in chains.values() for m in found), *rules]
        # Each message carries the low half of the generation that it shows.
        if {message.body[2:4] for message in seen} <= {generation.to_bytes(4)[2:]}:
            return held, generation
    raise KernelError("read iptables of the host", 0, "somebody keeps changing the rules while they are read")


def create(families: Sequence[int]) -> Iterator[Step[tuple[Command, ...]]]:
    """Missing tables and base chains, in one transaction. A table that is there already stays as it is."""
    lines, commands = list[str](), list[Command]()
    for family in families:
        word, protocol = WORD[family], _PROTOCOL[family]
        lines.append(f'add table {word} {TABLE} {{ comment "{MARK}" ; }}')
        body = attribute(1, TABLE) + attribute(2, 0) + attribute(6, comment_data(MARK))
        commands.append(Command(NEWTABLE, NLM_F_CREATE, protocol, body))
        head = "type nat hook postrouting priority 100; policy accept"
        lines.append(f'add chain {word} {TABLE} {BASE} {{ {head}; comment "{MARK}" ; }}')
        body = attribute(1, TABLE) + attribute(3, BASE) + _HOOK + attribute(7, "nat") + attribute(5, 1)
        commands.append(Command(NEWCHAIN, NLM_F_CREATE, protocol, body + attribute(12, comment_data(MARK))))
    if commands:
        yield Step("\n".join(lines), tuple(commands))


def drop(families: Sequence[int], have: Mapping[int, Held]) -> Iterator[Step[tuple[Command, ...]]]:
    """What we made and in which nothing is left."""
    lines, commands = list[str](), list[Command]()
    for family in families:
        word, protocol, held = WORD[family], _PROTOCOL[family], have[family]
        if held.bare:
            lines.append(f"delete table {word} {TABLE}")
            commands.append(Command(DELTABLE, 0, protocol, attribute(1, TABLE)))
        elif held.idle:
            lines.append(f"delete chain {word} {TABLE} {BASE}")
            commands.append(Command(DELCHAIN, 0, protocol, attribute(1, TABLE) + attribute(3, BASE)))
    if commands:
        yield Step("\n".join(lines), tuple(commands))


def _place(kind: int, chain: str) -> bytes:
    return attribute(1, TABLE) + attribute(kind, chain)


def _chain(nft: NftSocket, protocol: int, name: str) -> list[Message]:
    """One chain's message, none when it is not there."""
    try:
        return nft.request("read nf_tables", GETCHAIN, 0, bytes([protocol, 0, 0, 0]) + _place(3, name))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return []
        raise

# SPDX-License-Identifier: Apache-2.0
"""An independent reader of legacy tables: python-iptables, in a process of its own.

It keeps tables across namespaces, knows REDIRECT only for the first family that a process asks for, and hangs with two
threads: so one process per namespace and family. Run as a program it prints what is in the namespace it runs in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from agent.kernel.exec import run

TABLES = ("raw", "mangle", "nat")
EXTENSIONS = ("REDIRECT", "CONNMARK", "CT")  # of verdicts and jumps it cannot tell parameters
Rules = dict[str, list[dict[str, Any]]]


def read(netns: Path, family: int) -> Rules:
    """Rules by "table chain", each as a mapping of what python-iptables says of it."""
    found: Rules = json.loads(run([sys.executable, __file__, str(family)], netns=netns).stdout)
    return found


def _dump(family: int) -> Rules:
    import iptc

    kind = iptc.Table if family == 4 else iptc.Table6
    found: Rules = {}
    for table in TABLES:
        found |= {f"{table} {chain.name}": [_rule(rule) for rule in chain.rules] for chain in kind(table).chains}
    return found


def _rule(rule: Any) -> dict[str, Any]:
    matches = {match.name: match.get_all_parameters() for match in rule.matches}
    target = rule.target.name if rule.target else ""
    return {
        "protocol": rule.protocol,
        "source": rule.src,
        "destination": rule.dst,
        "in": rule.in_interface,
        "out": rule.out_interface,
        "comment": "".join(matches.pop("comment", {}).get("comment", [])),
        "matches": matches,
        "target": target,
        "parameters": rule.target.get_all_parameters() if target in EXTENSIONS else {},
    }


if __name__ == "__main__":
    print(json.dumps(_dump(int(sys.argv[1]))))

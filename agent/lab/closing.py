"""The end of the demo: the account that the agents keep themselves, held against what the lab saw."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from agent.core.text import table
from agent.lab import ask
from agent.lab.lab import Lab
from agent.lab.traffic import relayed

if TYPE_CHECKING:
    from agent.lab.demo import Checks
    from agent.lab.faults import Accounts

Found = Counter[tuple[str, str, str]]  # direction, fate, reason -> connections
_ORDER = ("captured", "exempt", "leaked", "undecided")


def report(lab: Lab, check: Checks, passed: Accounts) -> None:
    """Prints and checks. `passed`: what the lab counted in the windows in which connections could pass by."""
    print("\n== The account: every connection of the captured pods, as the agents counted it (sluice status)")
    found, collectors = _totals(lab)
    rows = sorted(found.items(), key=lambda pair: (_ORDER.index(pair[0][1]), -pair[1]))
    lines: list[tuple[object, ...]] = [(fate, reason, direction, count) for (direction, fate, reason), count in rows]
    print(table(("FATE", "REASON", "DIRECTION", "CONNECTIONS"), lines))
    check("they are counted", bool(found), f"by {', '.join(sorted(collectors))}")
    if collectors != {"ebpf"}:
        print("       since the agents' last start alone: nothing of this account outlives them")
        return
    taken = sum(record.direction == "outbound" for record in relayed(lab))
    captured = found["outbound", "captured", ""]
    # One that is cut off while it is provoked may be in one of the two accounts alone.
    close = abs(captured - taken) <= len(passed)
    check("as many are captured as the proxies took", close, f"{captured} counted here, {taken} by the proxies")
    escaped, leaked = sum(one.escaped for one in passed.values()), _sum(found, "outbound", "leaked")
    failed = sum(one.failed for one in passed.values())  # of these the lab cannot tell where they went
    claim = "leaked are those that passed by while it was provoked"
    held = escaped - len(passed) <= leaked <= escaped + failed + len(passed)
    check(claim, held, f"{leaked} counted here, {escaped} missed by the proxies, {failed} failed")
    # At the server's end the lab has an estimate alone: its proxy's records are not matched one to one.
    alone = sum(max(0, one.captured_outbound - one.captured_inbound) for one in passed.values())
    near = abs(_sum(found, "inbound", "leaked") - alone) <= 2 * len(passed)
    check("and so at the servers", near, f"{_sum(found, 'inbound', 'leaked')} counted here, about {alone} expected")


def _totals(lab: Lab) -> tuple[Found, set[str]]:
    """Of both nodes; and by which means."""
    found, collectors = Found(), set[str]()
    for node in lab.spec.nodes:
        answer = ask.agent(lab, node, "/v1/status")
        collectors.add(answer["accounting"])
        for row in answer["connections"]:
            found[row["direction"], row["fate"], row["reason"]] += row["connections"]
    return found, collectors


def _sum(found: Found, direction: str, fate: str) -> int:
    return sum(count for (way, what, _), count in found.items() if (way, what) == (direction, fate))

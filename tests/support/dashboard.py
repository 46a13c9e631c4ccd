# SPDX-License-Identifier: Apache-2.0
"""The shipped dashboard and the list of metrics, as tests ask for them."""

from __future__ import annotations

import json
import re
from typing import Any

from support.node import REPO

FILE = REPO / "deploy" / "dashboards" / "sluice.json"
METRICS = REPO / "docs" / "metrics.md"
ABOUT = ("node", "version", "accounting", "setting", "backend", "host_probes")  # labels of sluice_agent_info
_ALL = re.compile(r"\$(instance|namespace|workload|pod)\b")


def model() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(FILE.read_text())
    return made


def queries(rate: str = "", span: str = "") -> list[str]:
    """All that panels ask. With `rate` and `span`, as Grafana asks it while every variable is All."""
    shown = [target["expr"] for panel in model()["panels"] for target in panel.get("targets", ())]
    if not rate:
        return shown
    return [_ALL.sub(".*", one.replace("$__rate_interval", rate).replace("$__range", span)) for one in shown]


def variables() -> dict[str, tuple[str, str]]:
    """Of those that are asked for: the series, of any value, and the label."""
    found = {}
    for one in model()["templating"]["list"]:
        if one["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", one["query"]["query"])
            assert asked, one
            found[one["name"]] = _ALL.sub(".*", asked[1]), asked[2]
    return found


def documented() -> set[str]:
    """Families that docs/metrics.md has a row for."""
    return set(re.findall(r"^\| `(\w+?)(?:_total)?` \|", METRICS.read_text(), re.M))

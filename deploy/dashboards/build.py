#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes sluice.json, the dashboard for Grafana 9 and later, into this directory. usage: deploy/dashboards/build.py"""

from __future__ import annotations

import json
from pathlib import Path

from matching import AT
from nodes import NODE
from overview import OVERVIEW
from panels import laid_out, variable
from pods import PODS
from quality import DNS, QUALITY

VARIABLES = [
    variable("instance", "Node", "sluice_agent_info", "instance"),
    variable("namespace", "Namespace", f"sluice_connections_total{{{AT}}}", "namespace"),
    variable("workload", "Workload", f'sluice_connections_total{{{AT},namespace=~"$namespace"}}', "workload"),
    variable("pod", "Pod", f'sluice_sockets{{{AT},namespace=~"$namespace"}}', "pod"),
]

ROWS = {"Overview": OVERVIEW, "Node": NODE, "Pod": PODS, "Quality": QUALITY, "DNS": DNS}


def text() -> str:
    return json.dumps(laid_out("Sluice", "sluice", ROWS, VARIABLES), indent=1) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("sluice.json").write_text(text())

# SPDX-License-Identifier: Apache-2.0
"""The dashboard is what build.py makes, can be laid out and asked, and no metric is forgotten."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from support import dashboard
from support.prometheus import RULES, program

from agent.kernel.exec import run

FOLDER = RULES.parents[1] / "dashboards"
# Metrics that are in no panel, with the reason.
NOT_SHOWN = {
    "process_start_time_seconds": "alert SluiceAgentRestarts",
    "sluice_pod_foreign_rules": "alert SluiceForeignRules",
    "process_virtual_memory_bytes": "tells nothing beside the resident memory",
    "python_gc_objects_collected": "of interest to who works on the agent",
    "python_gc_objects_uncollectable": "likewise",
    "python_gc_collections": "likewise",
}


def test_the_file_is_what_the_generator_writes() -> None:
    made = subprocess.run(
        [sys.executable, "-B", "-c", "import build; print(build.text(), end='')"],
        cwd=FOLDER, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert dashboard.FILE.read_text() == made, "run deploy/dashboards/build.py"


def test_panels_have_numbers_places_units_and_words() -> None:
    model = dashboard.model()
    panels = model["panels"]
    assert model["schemaVersion"] >= 36 and model["uid"] == "sluice" and "id" not in model
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    taken = Counter[tuple[int, int]]()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        taken.update((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))
    assert max(taken.values()) == 1, "no panel lies on another"
    shown = [panel for panel in panels if panel["type"] != "row"]
    assert {panel["title"] for panel in panels} - {panel["title"] for panel in shown} == {
        "Overview", "Node", "Pod", "Quality", "DNS",
    }  # fmt: skip
    assert len({panel["title"] for panel in shown}) == len(shown)
    for panel in shown:
        assert len(panel["description"]) > 5 and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert [target["refId"] for target in panel["targets"]] == ["A", "B", "C"][: len(panel["targets"])]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    leaks = [panel for panel in shown if 'fate="leaked"' in str(panel["targets"])]
    assert leaks and all(
        step["value"] == 0.5 and step["color"] == "red"
        for panel in leaks
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]
    )


def test_variables_are_there_before_they_are_used() -> None:
    variables = {one["name"]: one for one in dashboard.model()["templating"]["list"]}
    assert list(variables) == ["datasource", "instance", "namespace", "workload", "pod"]
    known = set[str]()
    for name, one in variables.items():
        assert set(re.findall(r"\$(\w+)", str(one["query"]))) <= known
        known.add(name)
    used = set(re.findall(r"\$(\w+)", " ".join(dashboard.queries())))
    assert used - {"__rate_interval", "__range"} == known - {"datasource"}


def test_every_query_can_be_parsed(tmp_path: Path) -> None:
    """As a recording rule: promtool refuses what Prometheus would."""
    rules = [{"record": f"asked:{at}", "expr": expr} for at, expr in enumerate(dashboard.queries("2m", "1h"))]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in run([program("promtool"), "check", "rules", str(file)]).stdout
    rules[3]["expr"] += ")"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert run([program("promtool"), "check", "rules", str(file)], check=False).returncode  # so would a wrong one be


def names(text: str) -> set[str]:
    """Of families: without the suffixes of samples."""
    found = re.findall(r"\b(?:sluice|istio_tcp|process|python_gc)_\w+", text)
    return {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in found}


def test_every_metric_is_shown_or_alerts_or_is_left_out_on_purpose() -> None:
    """Those of the code are as docs/metrics.md has them, which test_metrics_doc compares."""
    metrics = dashboard.documented()
    shown, alerted = names(" ".join(dashboard.queries())), names(RULES.read_text())
    assert shown <= metrics, "asked for, and not there"
    assert metrics - shown == set(NOT_SHOWN)
    assert alerted <= metrics
    for name, why in NOT_SHOWN.items():
        assert "alert" not in why or name in alerted


def test_the_model_is_json_that_grafanas_import_takes() -> None:
    """No inputs to be filled in: the data source is a variable."""
    text = dashboard.FILE.read_text()
    model: dict[str, Any] = json.loads(text)
    assert "__inputs" not in model and text.endswith("}\n")
    assert {panel["type"] for panel in model["panels"]} == {"row", "stat", "timeseries", "table", "heatmap"}

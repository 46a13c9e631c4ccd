# SPDX-License-Identifier: Apache-2.0
"""Functions that build panels, variables and rows of Grafana's JSON model (schemaVersion 36, Grafana 9.0)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]
Thresholds = Sequence[tuple[str, float | None]]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
NONE: Thresholds = [("text", None)]
RED_FROM_ONE: Thresholds = [("green", None), ("red", 0.5)]  # an increase() is seldom a whole number


def query(expr: str, legend: str = "") -> Json:
    return {"expr": expr, "legendFormat": legend or "__auto", "datasource": DATASOURCE}


def quantiles(histogram: str, matching: str, by: Sequence[str] = ()) -> list[Json]:
    """Returns queries for the 50th, 90th and 99th percentile."""
    rates = f"sum by ({', '.join(('le', *by))}) (rate({histogram}_bucket{{{matching}}}[$__rate_interval]))"
    names = "".join(f"{{{{{name}}}}} " for name in by)
    return [query(f"histogram_quantile({q}, {rates})", f"{names}p{round(q * 100)}") for q in (0.5, 0.9, 0.99)]


def stat(title: str, about: str, unit: str, targets: list[Json], thresholds: Thresholds, decimals: int = 0) -> Json:
    calculated = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    options = {**calculated, "colorMode": "value", "graphMode": "none", "textMode": "auto", "justifyMode": "center"}
    # One value per query, over the whole time shown.
    once = [{**one, "instant": True, "range": False} for one in targets]
    made = _panel("stat", title, about, once, options, {"unit": unit, "decimals": decimals}, thresholds)
    return {**made, "gridPos": {"w": 4, "h": 4}}


def series(
    title: str,
    about: str,
    unit: str,
    targets: list[Json],
    *,
    stacked: bool = False,
    colors: Mapping[str, str] | None = None,
    thresholds: Thresholds | None = None,
) -> Json:
    custom = {
        "drawStyle": "line", "lineWidth": 1, "fillOpacity": 25 if stacked else 5, "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if thresholds else "off"},
    }  # fmt: skip
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"], "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    made = _panel("timeseries", title, about, targets, options, {"unit": unit, "min": 0, "custom": custom}, thresholds)
    made["fieldConfig"]["overrides"] = [
        {
            "matcher": {"id": "byName", "options": name},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": color}}],
        }
        for name, color in (colors or {}).items()
    ]
    return {**made, "gridPos": {"w": 12, "h": 8}}


def table(title: str, about: str, expr: str, columns: Sequence[str], width: int = 12, height: int = 7) -> Json:
    """Returns a table with one line per series and these labels as columns."""
    target = {**query(expr), "instant": True, "range": False, "format": "table"}
    made = _panel("table", title, about, [target], {"showHeader": True}, {"unit": "short"}, None)
    kept = {"include": {"names": list(columns)}}
    made["transformations"] = [
        {"id": "filterFieldsByName", "options": kept},
        {"id": "organize", "options": {"indexByName": {name: at for at, name in enumerate(columns)}}},
    ]
    return {**made, "gridPos": {"w": width, "h": height}}


def heatmap(title: str, about: str, unit: str, expr: str) -> Json:
    target = {**query(expr, "{{le}}"), "format": "heatmap"}
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange"},
        "yAxis": {"unit": unit, "axisPlacement": "left"},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"show": True, "yHistogram": False},
        "legend": {"show": True},
        "filterValues": {"le": 1e-9},
    }
    made = _panel("heatmap", f"{title}, as a heatmap", about, [target], options, {"unit": "short"}, None)
    return {**made, "gridPos": {"w": 12, "h": 8}}


def _panel(
    kind: str,
    title: str,
    about: str,
    targets: Iterable[Json],
    options: Json,
    defaults: Json,
    thresholds: Thresholds | None,
) -> Json:
    steps = [{"color": color, "value": value} for color, value in thresholds or [("green", None)]]
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": DATASOURCE,
        "targets": [{**one, "refId": chr(ord("A") + at)} for at, one in enumerate(targets)],
        "options": options,
        "fieldConfig": {"defaults": {**defaults, "thresholds": {"mode": "absolute", "steps": steps}}, "overrides": []},
    }


def variable(name: str, label: str, series: str, of: str) -> Json:
    """Returns a variable that selects any number of values of one label of these series."""
    asked = f"label_values({series}, {of})"
    return {
        "name": name, "label": label, "type": "query", "datasource": DATASOURCE, "definition": asked,
        "query": {"query": asked, "refId": f"Variable-{name}"}, "refresh": 2, "sort": 1, "hide": 0,
        "multi": True, "includeAll": True, "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]}, "options": [],
    }  # fmt: skip


def laid_out(title: str, uid: str, rows: Mapping[str, list[Json]], variables: list[Json]) -> Json:
    """Returns the dashboard: panels from left to right in 24 columns; the tallest panel sets the height of a row."""
    panels: list[Json] = []
    y = 0
    for name, inside in rows.items():
        place = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"type": "row", "title": name, "collapsed": False, "panels": [], "gridPos": place})
        x, y, high = 0, y + 1, 0
        for one in inside:
            size = one["gridPos"]
            if x + size["w"] > 24:
                x, y, high = 0, y + high, 0
            panels.append({**one, "gridPos": {"x": x, "y": y, **size}})
            x, high = x + size["w"], max(high, size["h"])
        y += high
    choice = {
        "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0,
        "refresh": 1, "regex": "", "multi": False, "includeAll": False, "current": {}, "options": [],
    }  # fmt: skip
    return {
        "uid": uid, "title": title, "tags": ["sluice", "service-mesh"], "schemaVersion": 36, "version": 1,
        "description": "Capture of pod traffic by ztunnel, and the state of the agents. Alerts: docs/runbooks.md.",
        "editable": True, "graphTooltip": 1, "refresh": "30s", "time": {"from": "now-1h", "to": "now"},
        "timezone": "", "links": [], "annotations": {"list": [_ALERTS]}, "templating": {"list": [choice, *variables]},
        "panels": [{"id": at, **one} for at, one in enumerate(panels, 1)],
    }  # fmt: skip


_ALERTS = {
    "name": "Alerts", "datasource": DATASOURCE, "enable": False, "hide": False, "iconColor": "red",
    "expr": 'ALERTS{alertname=~"Sluice.*",alertstate="firing"}', "step": "60s", "titleFormat": "{{alertname}}",
    "textFormat": "{{instance}} {{namespace}} {{pod}}",
}  # fmt: skip

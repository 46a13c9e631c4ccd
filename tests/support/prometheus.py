# SPDX-License-Identifier: Apache-2.0
"""Debian's Prometheus in a namespace, with the rules that are shipped; and GET over sockets made there."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml
from support.field import Inside
from support.node import REPO

from agent.kernel.exec import PATH
from agent.lab.processes import Children, await_ready

RULES = REPO / "deploy" / "alerts" / "sluice.rules.yaml"
_PORT = 9090
_FETCHED = REPO / "build" / "prometheus"  # by tools/setup


def program(name: str) -> str:
    """`prometheus` or `promtool`."""
    found = shutil.which(name, path=f"{_FETCHED}:{PATH}")
    assert found, f"no {name} here: run tools/setup, or install Debian's package prometheus"
    return found


def get(netns: Path, port: int, path: str, **headers: str) -> tuple[bytes, dict[str, str]]:
    """Body, decompressed, and headers of 127.0.0.1 in the namespace. An AssertionError when the answer is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.sock = Inside(netns).connect("127.0.0.1", port)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, (path, answer.status, body[:500])
        found = {name.lower(): value for name, value in answer.getheaders()}
    return gzip.decompress(body) if found.get("content-encoding") == "gzip" else body, found


def rules() -> list[dict[str, Any]]:
    """All that are shipped."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def hastened(text: str, by: int) -> str:
    """Returns rules with each duration `by` times shorter; nothing else is changed.

    Durations are those of `for`, of ranges and offsets (15m -> 9000ms for 100), and seconds that are written as minutes
    (15 * 60 -> 15 * 0.6).
    """
    units = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

    def shorter(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) * units[found[3]] // by}ms"

    text = re.sub(r"((?:\[|offset |for: ))(\d+)([smhd])\b", shorter, text)
    return text.replace(" * 60", f" * {60 / by}")


class Prometheus:
    """A server that runs; it scrapes `target`, host:port in its namespace, and judges, each second."""

    def __init__(self, netns: Path) -> None:
        self._netns = netns

    def ask(self, path: str, **query: str) -> Any:
        """`data` of an answer of the API."""
        body, _ = get(self._netns, _PORT, f"/api/v1/{path}?{urlencode(query)}")
        answer = json.loads(body)
        assert answer["status"] == "success" and not answer.get("warnings"), answer
        return answer["data"]

    def value(self, query: str) -> float:
        """The sum of what is found, 0 for nothing."""
        return sum(float(row["value"][1]) for row in self.ask("query", query=query)["result"])

    def alerts(self) -> dict[str, dict[str, Any]]:
        """By name, pending ones too."""
        found = self.ask("alerts")["alerts"]
        assert len({one["labels"]["alertname"] for one in found}) == len(found), found
        return {one["labels"]["alertname"]: one for one in found}

    def firing(self) -> dict[str, list[dict[str, str]]]:
        """Labels of the alerts that fire, by name."""
        found: dict[str, list[dict[str, str]]] = {}
        for one in self.ask("alerts")["alerts"]:
            if one["state"] == "firing":
                found.setdefault(one["labels"]["alertname"], []).append(one["labels"])
        return found

    def own(self) -> str:
        """What it counts itself."""
        return get(self._netns, _PORT, "/metrics")[0].decode()


@contextlib.contextmanager
def prometheus(
    children: Children, netns: Path, directory: Path, target: str, rules: Path = RULES
) -> Iterator[Prometheus]:
    """Ended afterwards. `discovered` may be written anew to change what it scrapes."""
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "sluice", "file_sd_configs": [{"files": [str(directory / "targets.json")]}]}],
    }
    directory.mkdir(parents=True)
    discovered(directory, target)
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    argv = [
        program("prometheus"), f"--config.file={directory}/prometheus.yaml", f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{_PORT}", "--enable-feature=exemplar-storage", "--log.level=warn",
    ]  # fmt: skip
    child = children.start("prometheus", argv, netns, directory / "log")
    try:
        await_ready(child, lambda: _ready(netns), 20, "ready")
        yield Prometheus(netns)
    finally:
        children.end("prometheus")


def discovered(directory: Path, *targets: str) -> None:
    """What it scrapes from now on; it watches the file."""
    (directory / "targets.new").write_text(json.dumps([{"targets": targets}]))
    (directory / "targets.new").replace(directory / "targets.json")


def _ready(netns: Path) -> bool:
    with contextlib.suppress(OSError, AssertionError):
        get(netns, _PORT, "/-/ready")
        return True
    return False

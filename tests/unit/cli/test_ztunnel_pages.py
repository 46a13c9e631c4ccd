# SPDX-License-Identifier: Apache-2.0
"""Which ztunnels are asked, and what is said when one does not answer."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from agent.cli import ztunnel_pages
from agent.cli.ztunnel_pages import ZtunnelPages
from agent.core.errors import SluiceError

DUMP = {
    "workloads": [], "services": [], "workloadState": {},
    "certificates": [{"identity": "spiffe://td/ns/shop/sa/web", "state": "Available",
                      "certChain": [{"expirationTime": "2026-03-04T05:06:07Z"}]}],
}  # fmt: skip
ROW = {"fate": "captured", "opened": 0.0, "closed": None, "direction": "outbound"}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {
        "/v1/status": {"ztunnel_processes": [os.getpid()], "ztunnels_since": 1.0},
        "/config_dump": json.dumps(DUMP).encode(),
        "/stats/prometheus": b"\xff",
    }

    def answer(path: str) -> Any:
        if isinstance(found[path], Exception):
            raise found[path]
        return found[path]

    monkeypatch.setattr(ztunnel_pages, "ask", lambda run_dir, path: answer(path))
    monkeypatch.setattr(ztunnel_pages, "page", lambda pid, port, path: answer(path))
    return found


def test_a_certificate_is_that_of_the_account(answers: dict[str, Any]) -> None:
    pages = ZtunnelPages("/r")
    assert pages.error == ""
    assert pages.certificate("shop", "web") == {
        "identity": "spiffe://td/ns/shop/sa/web", "state": "Available", "until": "2026-03-04T05:06:07Z",
    }  # fmt: skip
    assert pages.certificate("shop", "eb") == {}


@pytest.mark.parametrize(
    ("path", "answer", "error"),
    [
        ("/v1/status", SluiceError("cannot ask\nthe agent"), "cannot ask the agent"),
        ("/v1/status", {}, "cannot read ztunnel's pages, their format is unknown: KeyError 'ztunnel_processes'"),
        ("/v1/status", {"ztunnel_processes": [], "ztunnels_since": 1.0}, "no ztunnel is connected to the agent"),
        ("/v1/status", {"ztunnel_processes": [1 << 30], "ztunnels_since": 1.0}, "No such file or directory"),
        (
            "/v1/status", {"ztunnel_processes": [os.getpid(), os.getpid()], "ztunnels_since": 1.0},
            "share a network namespace, and only one of them has its ports",
        ),
        ("/config_dump", SluiceError("Connection refused"), "Connection refused"),
        ("/config_dump", b"{", "their format is unknown"),
        ("/config_dump", b"[]", "their format is unknown"),
        ("/config_dump", b'{"workloads": {"a": "b"}, "services": [], "workloadState": {}}', "their format is unknown"),
    ],
)  # fmt: skip
def test_an_error_makes_all_of_it_unknown(answers: dict[str, Any], path: str, answer: Any, error: str) -> None:
    answers[path] = answer
    pages = ZtunnelPages("/r")
    assert error in pages.error
    assert pages.add_to(ROW) == {**ROW, "wire": "unknown", "identity": "", "remote_identity": ""}
    assert pages.facts({"namespace": "shop", "service_account": "web"}, [ROW])["error"] == pages.error

# SPDX-License-Identifier: Apache-2.0
"""The life of certificates: one request per identity, renewal at half, the previous one while the CA is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.ztunnel.tls import certificates
from agent.ztunnel.tls.certificates import CONCURRENT, Certificates, CertificateState
from agent.ztunnel.tls.contexts import Credentials, CredentialsError
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.spiffe import SpiffeId


def identity(number: int = 0) -> SpiffeId:
    return SpiffeId("cluster.local", "shop", f"web{number}")


class Ca:
    """Counts requests; `away` lets them fail, `gate` holds them."""

    def __init__(self, directory: Path, lifetime: timedelta = timedelta(hours=1)) -> None:
        self.made = DevelopmentCa(directory, lifetime)
        self.asked: list[SpiffeId] = []
        self.running = self.most = 0
        self.away = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def issue(self, wanted: SpiffeId) -> Credentials:
        self.asked.append(wanted)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gate.wait()
            if self.away:
                raise CredentialsError("the CA is away")
            return self.made.issue(wanted)
        finally:
            self.running -= 1


async def _until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_one_request_per_identity_and_eight_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        ca = Ca(tmp_path)
        ca.gate.clear()
        delivered: list[SpiffeId] = []
        held = Certificates(ca.issue, lambda credentials: delivered.append(credentials.identity))
        for _ in range(3):
            for number in range(20):
                held.want(identity(number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert ca.running == CONCURRENT
        ca.gate.set()
        await _until(lambda: len(delivered) == 20)
        assert (len(ca.asked), ca.most) == (20, CONCURRENT)
        held.want(identity())  # held: no request
        assert len(ca.asked) == 20 and delivered[-1] == identity()
        await held.close()

    asyncio.run(run())


def test_renewed_at_half_and_kept_while_the_ca_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(certificates, "LAST_BACKOFF", 0.05)

    async def run() -> None:
        ca = Ca(tmp_path, timedelta(seconds=5))
        delivered: list[Credentials] = []
        offset = 0.0
        held = Certificates(ca.issue, delivered.append, lambda: time.time() + offset)
        held.want(identity())
        await _until(lambda: delivered)
        (status,) = held.statuses()
        assert status.state is CertificateState.AVAILABLE and status.validity is not None
        # Half of its life is over (the clock skew of the CA is part of it): renewed after the shortest pause.
        await _until(lambda: len(delivered) > 1)
        ca.away = True
        held.renew(identity())
        asked = len(ca.asked)
        await _until(lambda: len(ca.asked) > asked + 3)
        (status,) = held.statuses()
        assert (status.state, status.error) == (CertificateState.AVAILABLE, "the CA is away")
        offset = 3600.0
        (status,) = held.statuses()
        assert status.state is CertificateState.UNAVAILABLE
        ca.away = False
        offset = 0.0
        made = len(delivered)
        await _until(lambda: len(delivered) > made)
        held.forget(identity())
        assert held.statuses() == []
        await held.close()

    asyncio.run(run())

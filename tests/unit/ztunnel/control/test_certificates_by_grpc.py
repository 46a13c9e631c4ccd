# SPDX-License-Identifier: Apache-2.0
"""Certificates from Istio's CA and from a SPIFFE agent: real gRPC, another stack at the other end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate
from support.controlplane import ControlPlane, served

from agent.core.wire.protobuf import Message, embedded, text
from agent.ztunnel.control import istio_ca
from agent.ztunnel.control.grpc_channel import ControlPlaneError
from agent.ztunnel.control.istio_ca import IstioCa
from agent.ztunnel.control.workload_api import WorkloadApi
from agent.ztunnel.tls.contexts import Credentials, CredentialsError, make_contexts
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.keys import validity
from agent.ztunnel.tls.spiffe import SpiffeId

WEB = SpiffeId("cluster.local", "shop", "web")
OTHER = SpiffeId("cluster.local", "shop", "other")


@pytest.fixture
def ca(tmp_path: Path) -> DevelopmentCa:
    return DevelopmentCa(tmp_path / "ca")


@pytest.fixture
def plane(ca: DevelopmentCa) -> Iterator[tuple[ControlPlane, str]]:
    with served(ca) as both:
        yield both


def istio(address: str, token: Path) -> IstioCa:
    return IstioCa(address=address, roots="", token_file=token, cluster_id="c1", lifetime=86400, headers={"x-lab": "1"})


def test_a_request_names_the_identity_and_carries_the_current_token(
    plane: tuple[ControlPlane, str], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    asked = istio(plane[1], token)
    for each in ("one", "two"):
        token.write_text(f"{each}\n")
        credentials = asyncio.run(asked.issue(WEB))
        assert validity(credentials).end > validity(credentials).begin
        make_contexts(credentials)
        metadata = plane[0].metadata[-1]
        assert (metadata["authorization"], metadata["clusterid"], metadata["x-lab"]) == (f"Bearer {each}", "c1", "1")
    request = plane[0].requests.get()
    assert request.number(3) == 86400
    struct = request.message(4)
    assert struct is not None
    entry = Message(struct.raw(1))
    value = entry.message(2)
    assert value is not None and (entry.text(1), value.text(3)) == ("ImpersonatedIdentity", str(WEB))


def test_the_certificate_of_another_identity_is_not_believed(
    plane: tuple[ControlPlane, str], ca: DevelopmentCa, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("t")
    plane[0].sign = lambda uri, request: [ca.issue(OTHER).chain.decode(), ca.roots.decode()]
    with pytest.raises(CredentialsError, match=r"for spiffe://cluster.local/ns/shop/sa/web is of .*/sa/other"):
        validity(asyncio.run(istio(plane[1], tmp_path / "token").issue(WEB)))
    plane[0].sign = lambda uri, request: [ca.issue(WEB).chain.decode(), ca.roots.decode()]
    with pytest.raises(CredentialsError, match="another key"):
        validity(asyncio.run(istio(plane[1], tmp_path / "token").issue(WEB)))
    plane[0].sign = lambda uri, request: ["garbage", "garbage"]
    with pytest.raises(CredentialsError, match="cannot be read"):
        validity(asyncio.run(istio(plane[1], tmp_path / "token").issue(WEB)))


def test_a_ca_that_is_away_or_a_token_that_is_missing_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CredentialsError, match=r"token .*: No such file"):
        asyncio.run(istio("http://127.0.0.1:1", tmp_path / "token").issue(WEB))
    (tmp_path / "token").write_text("t")
    with pytest.raises(ControlPlaneError, match=r"CreateCertificate: .*refused"):
        asyncio.run(istio("http://127.0.0.1:1", tmp_path / "token").issue(WEB))


def test_a_ca_that_never_answers_is_given_up(
    plane: tuple[ControlPlane, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(istio_ca, "_SECONDS", 0.3)
    (tmp_path / "token").write_text("t")
    answer = threading.Event()

    def never(uri: str, request: Message) -> list[str]:
        answer.wait(30)
        return []

    plane[0].sign = never
    try:
        with pytest.raises(ControlPlaneError, match="CreateCertificate: Deadline exceeded"):
            asyncio.run(istio(plane[1], tmp_path / "token").issue(WEB))
    finally:
        answer.set()


def test_a_spiffe_agent_pushes_each_new_certificate(ca: DevelopmentCa, tmp_path: Path) -> None:
    def svid(credentials: Credentials) -> bytes:
        key = load_pem_private_key(credentials.key, None)
        return embedded(
            1,
            text(1, str(credentials.identity))
            + embedded(2, load_pem_x509_certificate(credentials.chain).public_bytes(Encoding.DER))
            + embedded(3, key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))
            + embedded(4, load_pem_x509_certificate(ca.roots).public_bytes(Encoding.DER)),
        )

    async def follow(plane: ControlPlane, address: str) -> None:
        changed: asyncio.Queue[SpiffeId] = asyncio.Queue()
        api = WorkloadApi(address, changed.put_nowait)
        running = asyncio.create_task(api.run())
        for _ in range(2):
            plane.pushes.put(svid(ca.issue(WEB)))
            assert await asyncio.wait_for(changed.get(), 30) == WEB
            make_contexts(await api.issue(WEB))
        with pytest.raises(CredentialsError, match=r"no certificate of .*other"):
            await api.issue(OTHER)
        running.cancel()

    with served(ca, f"unix://{tmp_path}/agent.sock") as (plane, address):
        asyncio.run(follow(plane, address))
        assert plane.metadata[-1]["workload.spiffe.io"] == "true"

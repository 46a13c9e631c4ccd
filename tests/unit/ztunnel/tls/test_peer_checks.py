# SPDX-License-Identifier: Apache-2.0
"""Who a peer is, and which identities are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from agent.ztunnel.tls.peer_checks import PeerError, check_server, client_identity, uris
from agent.ztunnel.tls.spiffe import SpiffeId

WEB, SHOP = "spiffe://td/ns/demo/sa/web", "spiffe://td/ns/demo/sa/shop"
FOREIGN = "spiffe://other/ns/demo/sa/web"


def certificate(*names: str, host: str = "") -> dict[str, Any]:
    """As `ssl.SSLObject.getpeercert` returns it."""
    hosts = (("DNS", host),) if host else ()
    return {"subject": (), "subjectAltName": (*hosts, *(("URI", name) for name in names))}


def test_only_uris_are_identities() -> None:
    assert uris(certificate(WEB, SHOP, host="web.example")) == [WEB, SHOP]
    assert uris({}) == uris(None) == []


@pytest.mark.parametrize(
    ("names", "identity"),
    [
        ([WEB], SpiffeId("td", "demo", "web")),
        (["https://example.com", WEB], SpiffeId("td", "demo", "web")),
        ([WEB, SHOP], SpiffeId("td", "demo", "web")),
        ([FOREIGN, SHOP], SpiffeId("other", "demo", "web")),  # one of them must be of the trust domain
    ],
)
def test_a_client_is_its_first_identity(names: list[str], identity: SpiffeId) -> None:
    assert client_identity(certificate(*names), "td") == identity


@pytest.mark.parametrize("names", [[], ["https://example.com"], ["spiffe://td/ns/demo"], [FOREIGN]])
def test_a_client_without_an_identity_of_the_trust_domain_is_refused(names: list[str]) -> None:
    with pytest.raises(PeerError):
        client_identity(certificate(*names, host="web.example"), "td")


def test_a_server_must_be_one_of_those_that_were_expected() -> None:
    assert check_server(certificate("https://x", SHOP), {WEB, SHOP}) == SHOP
    for names in ([], [WEB], [SHOP + "x"], [SHOP.upper()]):
        with pytest.raises(PeerError, match="not spiffe://td/ns/demo/sa/shop"):
            check_server(certificate(*names), {SHOP})
    with pytest.raises(PeerError):
        check_server(certificate(SHOP), set())

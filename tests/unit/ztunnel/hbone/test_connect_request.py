# SPDX-License-Identifier: Apache-2.0
"""Requests of HBONE clients, well-formed and not."""

from __future__ import annotations

import pytest

from agent.ztunnel.hbone.connect_request import ConnectRequest, parse, parse_authority, request, response


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[fd00::1]:443", ("fd00::1", 443)),
        ("[FD00:0::1]:443", ("fd00::1", 443)),
        ("web.shop.svc.cluster.local:65535", ("web.shop.svc.cluster.local", 65535)),
        ("fd00::1:443", None),
        ("[10.0.0.1]:80", None),
        ("[web]:80", None),
        ("10.0.0.1", None),
        ("10.0.0.1:", None),
        ("10.0.0.1:0", None),
        ("10.0.0.1:65536", None),
        ("10.0.0.1:٣", None),
        ("10.0.0.1:+80", None),
        (":80", None),
        ("we b:80", None),
        ("wéb:80", None),
        ("x" * 300 + ":80", None),
        ("10.0.0.1:" + "9" * 5000, None),
        ("", None),
    ],
)
def test_an_authority_is_an_address_or_a_name_with_a_port(text: str, parts: tuple[str, int] | None) -> None:
    assert parse_authority(text) == parts


def test_a_request_is_read_as_it_was_written() -> None:
    fields = (("baggage", "k8s.pod.name=web"), ("forwarded", 'for="10.0.0.2:1234"'))
    assert parse(request("10.0.0.1:80", fields)) == ConnectRequest("10.0.0.1", 80, dict(fields))


def test_the_first_of_equal_fields_counts() -> None:
    found = parse(request("10.0.0.1:80", (("baggage", "a=1"), ("baggage", "a=2"))))
    assert found is not None and found.headers == {"baggage": "a=1"}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b":method", b"GET"), (b":authority", b"10.0.0.1:80")],
        [(b":method", b"CONNECT")],
        [(b":method", b"CONNECT"), (b":authority", b"10.0.0.1")],
        [(b":method", b"CONNECT"), (b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")],
        [(b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"), (b":authority", b"10.0.0.2:80")],
        [(b"baggage", b"x"), (b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")],
        [(b":method", b"CONNECT"), (b":authority", b"\xff\xfe:80")],
    ],
)
def test_other_requests_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    assert parse(headers) is None


def test_scheme_and_path_are_ignored() -> None:
    headers = [(b":method", b"CONNECT"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", b"10.0.0.1:80")]
    assert parse(headers) == ConnectRequest("10.0.0.1", 80, {})


def test_a_response_has_its_status_first() -> None:
    assert response(200, (("baggage", "a=b"),)) == [(b":status", b"200"), (b"baggage", b"a=b")]

# SPDX-License-Identifier: Apache-2.0
"""Any content of a revocation list's file is read or refused, and nothing else comes out."""

from __future__ import annotations

import base64
import contextlib

from hypothesis import given
from hypothesis import strategies as st
from support.revoking import root

from agent.ztunnel.tls.revocation_lists import RevocationListError, parse

PEM = root().revoke(1, 2, 3)
DER = base64.b64decode(b"".join(PEM.splitlines()[1:-1]))


@given(st.binary(max_size=400))
def test_any_bytes(content: bytes) -> None:
    for prefix in (b"", b"\x30", b"-----BEGIN X509 CRL-----\n"):
        with contextlib.suppress(RevocationListError):
            parse(prefix + content, "x")


@given(st.sampled_from([PEM, DER]), st.data())
def test_damaged_lists(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RevocationListError):
        parse(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), "x")


def test_the_examples_are_lists() -> None:
    assert parse(PEM, "x") == parse(DER, "x")

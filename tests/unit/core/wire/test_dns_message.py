# SPDX-License-Identifier: Apache-2.0
"""DNS messages, good, hostile and cut off; scapy has written the good ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dns import DNS, DNSQR, DNSRR
from support.resolver import answer, query

from agent.core.wire.dns_message import DnsMessage, code_word, question_end, read, type_word

WWW = "www.example.com"
RECORDS = (
    DNSRR(rrname=WWW, type="CNAME", ttl=9, rdata="web.example.com")
    / DNSRR(rrname="web.example.com", type="A", ttl=70, rdata="192.0.2.1")
    / DNSRR(rrname="web.example.com", type="AAAA", ttl=60, rdata="2001:db8::1")
)


def scapys(**fields: object) -> bytes:
    return bytes(DNS(id=7, qd=DNSQR(qname=WWW, qtype="AAAA"), **fields))


def test_a_query_and_its_answers() -> None:
    assert read(scapys(rd=1)) == DnsMessage(7, False, WWW, 28, 0)
    assert read(scapys(qr=1, rcode=3)) == DnsMessage(7, True, WWW, 28, 3)
    whole = scapys(qr=1, ancount=3, an=RECORDS)
    assert read(whole) == DnsMessage(7, True, WWW, 28, 0, ("192.0.2.1", "2001:db8::1"), 60)
    for size in range(question_end(whole), len(whole)):
        assert read(whole[:size]) in (
            DnsMessage(7, True, WWW, 28, 0),
            DnsMessage(7, True, WWW, 28, 0, ("192.0.2.1",), 70),
        )


def test_an_answer_without_its_question() -> None:
    """As servers send it that do not understand a query."""
    assert read(bytes(DNS(id=7, qr=1, rcode=1, qd=None))) == DnsMessage(7, True, "", 0, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        query(WWW)[:11],
        query(WWW)[:-1],
        query(WWW)[:2] + b"\x29\0" + query(WWW)[4:],  # an update
        query(WWW)[:4] + b"\0\2" + query(WWW)[6:],  # two questions
        query(WWW)[:4] + b"\0\0" + query(WWW)[6:],  # none
        query(WWW)[:12] + b"\x40" + query(WWW)[13:],  # a label that is too long
        query(".".join(["x" * 60] * 5)),
    ],
)
def test_what_is_no_query(data: bytes) -> None:
    assert read(data) is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"a\nb.\x1b[2J", r"a\nb.\x1b[2J"), (b"\xe2\x80\xae.test", r"\xe2\x80\xae.test"), (b"\0", r"\x00")],
)
def test_a_name_is_printable(name: bytes, shown: str) -> None:
    message = read(query(name))
    assert message and message.name == shown and shown.isprintable()


def test_words() -> None:
    assert [type_word(kind) for kind in (1, 28, 65, 999)] == ["A", "AAAA", "HTTPS", "TYPE999"]
    assert [code_word(code) for code in (0, 3, 9)] == ["NOERROR", "NXDOMAIN", "RCODE9"]


GOOD = answer(query(WWW), 0, "192.0.2.1", "2001:db8::1")


@given(st.one_of(st.binary(max_size=600), st.binary(max_size=300).map(lambda tail: GOOD[:12] + tail)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    message = read(data)
    if message:
        assert message.name.isprintable() and message.name.isascii() and len(message.name) <= 4 * 255
        assert len(message.addresses) <= 32


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
def test_any_changed_byte_is_read_or_refused(at: int, byte: int) -> None:
    read(GOOD[:at] + bytes((byte,)) + GOOD[at + 1 :])

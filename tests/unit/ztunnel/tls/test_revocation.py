# SPDX-License-Identifier: Apache-2.0
"""Revocation lists: what counts, what files may do, and which sessions end."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from support.revoking import HOUR, Authority, ders, named, root, serial

from agent.ztunnel.tls import revocation
from agent.ztunnel.tls.contexts import Credentials
from agent.ztunnel.tls.development_ca import DevelopmentCa
from agent.ztunnel.tls.revocation import Revocations
from agent.ztunnel.tls.revocation_lists import Finding, RevocationListError, RevocationLists, parse
from agent.ztunnel.tls.spiffe import SpiffeId

WEB = SpiffeId("td", "demo", "web")
NOW = time.time()


@pytest.fixture(scope="module", params=["ECDSA", "RSA"])
def top(request: pytest.FixtureRequest) -> Authority:
    return root(by_rsa=request.param == "RSA")


def judge(credentials: Credentials, *lists: bytes) -> Finding:
    held = [one for text in lists for one in parse(text, "list.pem")]
    return RevocationLists(held).judge(ders(credentials), NOW)


def test_a_certificate_on_its_issuers_list_is_revoked(top: Authority) -> None:
    made = top.issue(WEB)
    found = judge(made, top.revoke(1, serial(made), 3))
    assert found.revoked == f"certificate {serial(made):x} of CN=root is revoked by list.pem"
    assert judge(made, top.revoke(1, 3)) == Finding()
    assert judge(made, top.revoke()) == Finding()


def test_each_certificate_of_the_chain_counts(top: Authority) -> None:
    middle = top.below("middle")
    made = middle.issue(WEB)
    assert judge(made, top.revoke(), middle.revoke()) == Finding()
    assert "of CN=middle is revoked" in judge(made, top.revoke(), middle.revoke(serial(made))).revoked
    inner = middle.certificate.serial_number
    assert judge(made, top.revoke(inner)).revoked == f"certificate {inner:x} of CN=root is revoked by list.pem"
    assert judge(made, middle.revoke(inner)).revoked == ""  # another issuer's number
    assert judge(made, middle.revoke()).unknown == "no revocation list of CN=root"


def test_a_list_counts_only_with_the_signature_of_the_chains_issuer(top: Authority) -> None:
    made = top.issue(WEB)
    namesake = root()
    assert judge(made, namesake.revoke(serial(made))) == Finding(unknown="no revocation list of CN=root")
    assert judge(made, namesake.revoke(serial(made)), top.revoke()) == Finding()
    middle = top.below("middle", may_sign_lists=False)
    made = middle.issue(WEB)
    assert judge(made, top.revoke(), middle.revoke(serial(made))).revoked == ""


def test_an_expired_list_still_revokes_and_is_not_current(top: Authority) -> None:
    made = top.issue(WEB)
    assert judge(made, top.revoke(serial(made), until=-HOUR)).revoked
    assert judge(made, top.revoke(until=-HOUR)).unknown == "every revocation list is expired of CN=root"
    assert judge(made, top.revoke(until=-HOUR), top.revoke()) == Finding()


def test_the_trusted_certificate_itself_needs_no_list(top: Authority) -> None:
    assert RevocationLists().judge([ders(top.issue(WEB))[-1]], NOW) == Finding()


def test_files_are_pem_bundles_or_der(top: Authority) -> None:
    bundle = top.pem + top.revoke(1) + b"text between\n" + top.revoke(2, 3)
    assert [len(one.serials) for one in parse(bundle, "x")] == [1, 2]
    der = base64.b64decode(b"".join(top.revoke(4).splitlines()[1:-1]))
    assert parse(der, "x")[0].serials == {4}
    assert parse(b"", "x") == parse(b"\n", "x") == ()


def test_lists_that_would_be_misread_are_refused(top: Authority) -> None:
    indirect = x509.IssuingDistributionPoint(
        full_name=None, relative_name=named("x").rdns[0], only_contains_user_certs=False,
        only_contains_ca_certs=False, only_some_reasons=None, indirect_crl=True, only_contains_attribute_certs=False,
    )  # fmt: skip
    for extension, error in ((x509.DeltaCRLIndicator(1), "critical extension 2.5.29.27"), (indirect, "indirect")):
        with pytest.raises(RevocationListError, match=error):
            parse(top.revoke(1, extension=extension), "x")


@pytest.mark.parametrize("content", [b"garbage", b"\x30", b"\x30\x03\x02\x01\x01",
                                     b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"])  # fmt: skip
def test_garbage_is_an_error(content: bytes) -> None:
    with pytest.raises(RevocationListError):
        parse(content, "x")


def test_the_development_authority_makes_lists(tmp_path: Path) -> None:
    ca = DevelopmentCa(tmp_path)
    made = ca.issue(WEB)
    assert judge(made, ca.revocation_list([])) == Finding()
    assert judge(made, ca.revocation_list([serial(made)])).revoked


class Session:
    """A peer with these certificates."""

    def __init__(self, credentials: Credentials | None, revocations: Revocations) -> None:
        self._chain = ders(credentials) if credentials else [b"garbage"]
        self._revocations = revocations
        self.client = True
        self.why = ""

    def peer_chain(self) -> list[bytes]:
        return self._chain

    def revoke(self, why: str) -> None:
        assert not self.why
        self.why = why
        self._revocations.leave(self)


def admitted(revocations: Revocations, credentials: Credentials | None) -> Session:
    made = Session(credentials, revocations)
    revocations.admit(made)
    return made


REJECTED = ("istio_crl_policy_rejections", (("reporter", "source"),))
UNTRACKED = ("istio_crl_untracked_connections", (("reporter", "source"),))


def test_a_change_of_the_file_ends_the_sessions_of_revoked_peers(tmp_path: Path) -> None:
    top, path = root(), tmp_path / "crl.pem"
    good, bad = top.issue(WEB), top.issue(WEB)

    async def run() -> None:
        path.write_bytes(top.revoke())
        revocations = Revocations(path, closed=False)
        await revocations.look()
        live = [admitted(revocations, one) for one in (good, bad, bad)]
        gone = admitted(revocations, bad)
        revocations.leave(gone)
        assert not any(one.why for one in live) and revocations.series() == {}
        path.write_bytes(top.revoke(serial(bad)))
        await revocations.look()
        expected = f"certificate {serial(bad):x} of CN=root is revoked by {path}"
        assert [one.why for one in (*live, gone)] == ["", expected, expected, ""]
        assert admitted(revocations, bad).why == expected
        assert revocations.series() == {REJECTED: 3}

    asyncio.run(run())


@pytest.mark.parametrize("closed", [False, True])
def test_without_a_current_list_the_setting_decides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, closed: bool
) -> None:
    top, path = root(), tmp_path / "crl.pem"
    made = top.issue(WEB)

    async def refusal(content: bytes | None) -> str:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        revocations = Revocations(path, closed=closed)
        await revocations.look()
        return admitted(revocations, made).why

    lists = {
        None: "no revocation list of CN=root",
        b"": "no revocation list of CN=root",
        b"garbage": "no revocation list of CN=root",
        root("other").revoke(): "no revocation list of CN=root",
        root().revoke(): "no revocation list of CN=root",
        top.revoke(until=timedelta(seconds=-1)): "every revocation list is expired of CN=root",
    }
    for content, why in lists.items():
        caplog.clear()
        assert asyncio.run(refusal(content)) == (why if closed else "")
        if not closed:
            assert f"served without a check for revocation: {why}" in caplog.text
    assert asyncio.run(refusal(top.revoke())) == ""
    assert "is revoked" in asyncio.run(refusal(top.revoke(serial(made))))


@pytest.mark.parametrize("closed", [False, True])
def test_a_peer_that_cannot_be_read_is_untracked(tmp_path: Path, closed: bool) -> None:
    revocations = Revocations(tmp_path, closed=closed)
    assert bool(admitted(revocations, None).why) == closed
    assert revocations.series()[UNTRACKED] == 1


def test_a_directory_is_followed_file_by_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one, other = root("one"), root("other")
    first, second = one.issue(WEB), other.issue(WEB)

    async def run() -> None:
        revocations = Revocations(tmp_path, closed=False)

        async def revoked() -> list[bool]:
            await revocations.look()
            return [bool(admitted(revocations, made).why) for made in (first, second)]

        assert await revoked() == [False, False]
        (tmp_path / "one.pem").write_bytes(one.revoke(serial(first)))
        assert await revoked() == [True, False]
        (tmp_path / "other.pem").write_bytes(other.revoke(serial(second)))
        (tmp_path / ".hidden").write_bytes(b"garbage")
        (tmp_path / "folder").mkdir()
        (tmp_path / "dangling").symlink_to("nothing")
        assert await revoked() == [True, True]
        (tmp_path / "one.pem").write_bytes(b"garbage")  # what it had stays
        assert await revoked() == [True, True]
        assert "one.pem: neither PEM" in caplog.text and "the previous one is kept" in caplog.text
        (tmp_path / "one.pem").unlink()
        assert await revoked() == [False, True]
        caplog.clear()
        assert await revoked() == [False, True] and not caplog.text

    asyncio.run(run())


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocation, "MAX_FILE", 1 << 20)
    (tmp_path / "crl.pem").write_bytes(bytes((1 << 20) + 1))
    asyncio.run(Revocations(tmp_path / "crl.pem", closed=False).look())
    assert "more than 1 MiB" in caplog.text


def test_a_directory_that_cannot_be_read_keeps_its_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top = root()
    made = top.issue(WEB)
    (tmp_path / "crl.pem").write_bytes(top.revoke(serial(made)))

    async def run() -> None:
        revocations = Revocations(tmp_path, closed=False)
        await revocations.look()

        def fail(path: Path) -> object:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "iterdir", fail)
        await revocations.look()
        assert admitted(revocations, made).why

    asyncio.run(run())


def test_a_large_list_is_read_beside_the_loop(tmp_path: Path) -> None:
    """The loop goes on while 50,000 entries are read: it runs many times meanwhile, not twice."""
    top = root()
    builder = x509.CertificateRevocationListBuilder(
        named("root"), top.certificate.not_valid_before_utc, top.certificate.not_valid_after_utc,
        revoked_certificates=[
            x509.RevokedCertificateBuilder(number, top.certificate.not_valid_before_utc).build()
            for number in range(1 << 100, (1 << 100) + 50_000)
        ],
    )  # fmt: skip
    path = tmp_path / "crl.der"
    path.write_bytes(builder.sign(top.key, hashes.SHA256()).public_bytes(Encoding.DER))

    async def run() -> int:
        revocations = Revocations(path, closed=False)
        turns = 0
        looking = asyncio.create_task(revocations.look())
        while not looking.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert len(next(iter(parse(path.read_bytes(), "x"))).serials) == 50_000
        return turns

    assert asyncio.run(run()) >= 5

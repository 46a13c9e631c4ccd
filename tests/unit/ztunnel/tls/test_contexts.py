# SPDX-License-Identifier: Apache-2.0
"""Handshakes in memory with credentials of the development CA, of files, and with bad ones."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from agent.core.errors import SettingsError
from agent.ztunnel.hbone.tls_codec import TlsCodec, TlsError
from agent.ztunnel.tls.contexts import ContextStore, Credentials, CredentialsError, make_contexts
from agent.ztunnel.tls.development_ca import CA_FILE, DevelopmentCa
from agent.ztunnel.tls.file_identities import FileIdentities
from agent.ztunnel.tls.peer_checks import uris
from agent.ztunnel.tls.sources import CredentialsSource, credentials_source
from agent.ztunnel.tls.spiffe import SpiffeId
from agent.ztunnel.ztunnel_settings import ZtunnelSettings

WEB, SHOP = SpiffeId("td", "demo", "web"), SpiffeId("td", "demo", "shop")


@pytest.fixture
def ca(tmp_path: Path) -> DevelopmentCa:
    return DevelopmentCa(tmp_path / "ca")


def shake(client: ssl.SSLContext, server: ssl.SSLContext) -> tuple[TlsCodec, TlsCodec]:
    """Both ends after the handshake. Raises TlsError of the end that notices first."""
    ends = TlsCodec(client, client=True), TlsCodec(server, client=False)
    done = [False, False]
    while not all(done):
        for number in (0, 1):
            if not done[number]:
                done[number] = ends[number].shake_hands()
            ends[1 - number].feed(memoryview(ends[number].outgoing.read()))
    return ends


def heard(end: TlsCodec) -> bytes:
    return b"".join(bytes(part) for part in end.decrypt(memoryview(bytearray(64 << 10))))


def test_both_ends_see_each_others_identity(ca: DevelopmentCa) -> None:
    client, server = shake(make_contexts(ca.issue(WEB)).client, make_contexts(ca.issue(SHOP)).server)
    assert uris(client.peer_certificate()) == [str(SHOP)]
    assert uris(server.peer_certificate()) == [str(WEB)]
    message = bytes(range(256)) * 1000
    client.encrypt(message)
    server.feed(memoryview(client.outgoing.read()))
    assert heard(server) == message
    server.close()
    client.feed(memoryview(server.outgoing.read()))
    assert heard(client) == b""


def test_the_authority_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    one, other = DevelopmentCa(tmp_path / "ca"), DevelopmentCa(tmp_path / "ca")
    assert one.roots == other.roots
    assert (tmp_path / "ca" / CA_FILE).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "ca").iterdir()] == [CA_FILE]
    shake(make_contexts(one.issue(WEB)).client, make_contexts(other.issue(SHOP)).server)


def test_a_certificate_has_what_istios_have(ca: DevelopmentCa) -> None:
    leaf = x509.load_pem_x509_certificate(ca.issue(WEB).chain)
    assert list(leaf.subject) == []
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical and names.value.get_values_for_type(x509.UniformResourceIdentifier) == [str(WEB)]
    assert ca.issue(WEB).key != ca.issue(WEB).key


def test_a_certificate_of_another_authority_is_refused(ca: DevelopmentCa, tmp_path: Path) -> None:
    foreign = DevelopmentCa(tmp_path / "foreign")
    with pytest.raises(TlsError):
        shake(make_contexts(ca.issue(WEB)).client, make_contexts(foreign.issue(SHOP)).server)
    # A client of another authority that would trust this one: the server notices.
    liar = replace(foreign.issue(WEB), roots=ca.roots)
    with pytest.raises(TlsError, match="certificate"):
        shake(make_contexts(liar).client, make_contexts(ca.issue(SHOP)).server)


def test_an_expired_certificate_is_refused(tmp_path: Path) -> None:
    ca = DevelopmentCa(tmp_path / "ca", lifetime=timedelta(seconds=-60))
    valid = DevelopmentCa(tmp_path / "ca")
    with pytest.raises(TlsError, match="expired"):
        shake(make_contexts(valid.issue(WEB)).client, make_contexts(ca.issue(SHOP)).server)
    with pytest.raises(TlsError, match="expired"):
        shake(make_contexts(ca.issue(WEB)).client, make_contexts(valid.issue(SHOP)).server)


def test_a_client_without_a_certificate_another_protocol_and_old_tls_are_refused(ca: DevelopmentCa) -> None:
    server = make_contexts(ca.issue(SHOP)).server
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    bare.set_alpn_protocols(["h2"])
    with pytest.raises(TlsError, match="certificate"):
        shake(bare, server)
    web = make_contexts(ca.issue(WEB)).client
    web.set_alpn_protocols(["http/1.1"])
    with pytest.raises(TlsError, match="ALPN"):
        shake(web, server)
    bare.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(TlsError, match=r"version|protocol"):
        shake(bare, server)


def test_bytes_that_are_not_tls_are_refused(ca: DevelopmentCa) -> None:
    end = TlsCodec(make_contexts(ca.issue(SHOP)).server, client=False)
    end.feed(memoryview(b"GET / HTTP/1.1\r\n\r\n"))
    with pytest.raises(TlsError):
        end.shake_hands()


@pytest.mark.parametrize("part", ["key", "chain", "roots"])
@pytest.mark.parametrize(
    "value", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\xff"]
)
def test_credentials_that_are_garbage_are_an_error(ca: DevelopmentCa, part: str, value: bytes) -> None:
    with pytest.raises(CredentialsError, match="spiffe://td/ns/demo/sa/web"):
        make_contexts(replace(ca.issue(WEB), **{part: value}))


def test_a_key_of_another_certificate_is_an_error(ca: DevelopmentCa) -> None:
    with pytest.raises(CredentialsError):
        make_contexts(replace(ca.issue(WEB), key=ca.issue(WEB).key))


def write(folder: Path, credentials: Credentials, *, own_root: bool) -> None:
    own = folder / credentials.identity.namespace / credentials.identity.service_account
    own.mkdir(parents=True)
    (own / "cert-chain.pem").write_bytes(credentials.chain)
    (own / "key.pem").write_bytes(credentials.key)
    ((own if own_root else folder) / "root-cert.pem").write_bytes(credentials.roots)


@pytest.mark.parametrize("own_root", [True, False])
def test_credentials_come_from_files(ca: DevelopmentCa, tmp_path: Path, own_root: bool) -> None:
    made = ca.issue(WEB)
    write(tmp_path / "files", made, own_root=own_root)
    files = FileIdentities(tmp_path / "files")
    assert files.read(WEB) == made
    with pytest.raises(CredentialsError, match="cert-chain"):
        files.read(SHOP)
    assert files.changed(WEB) > 0 and files.changed(SHOP) == 0


@pytest.mark.parametrize("account", ["..", "../..", "../../../etc"])
def test_an_identity_does_not_lead_out_of_the_directory(tmp_path: Path, account: str) -> None:
    (tmp_path / "files").mkdir()
    with pytest.raises(CredentialsError):
        FileIdentities(tmp_path / "files").read(SpiffeId("td", "..", account))


def test_the_setting_names_the_source(ca: DevelopmentCa, tmp_path: Path) -> None:
    def source(setting: str) -> CredentialsSource:
        return credentials_source(ZtunnelSettings(identities=setting), lambda identity: None)

    assert asyncio.run(source(f"development:{tmp_path / 'ca'}").issue(WEB)).roots == ca.roots
    write(tmp_path / "files", ca.issue(WEB), own_root=True)
    assert asyncio.run(source(f"files:{tmp_path / 'files'}").issue(WEB)).identity == WEB
    for wrong in ("", "files", "files:", "vault:/x"):
        with pytest.raises(SettingsError):
            source(wrong)


@pytest.mark.parametrize("content", ["", "garbage", "-----BEGIN CERTIFICATE-----\n"])
def test_a_damaged_authority_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / CA_FILE).write_text(content)
    with pytest.raises(CredentialsError, match="development CA"):
        DevelopmentCa(tmp_path)


def test_a_store_asks_once_and_calls_those_that_wait(ca: DevelopmentCa) -> None:
    asked: list[SpiffeId] = []
    store = ContextStore(asked.append)
    ready: list[str] = []
    assert store.get(WEB) is None and store.get(WEB) is None
    store.wait(WEB, lambda: ready.append("one"))
    store.wait(WEB, lambda: ready.append("two"))
    store.put(ca.issue(WEB))
    assert asked == [WEB] and ready == ["one", "two"]
    first = store.get(WEB)
    assert first is not None
    with pytest.raises(CredentialsError):
        store.put(replace(ca.issue(WEB), key=b""))
    assert store.get(WEB) is first
    store.put(ca.issue(WEB))
    assert store.get(WEB) is not first and ready == ["one", "two"]
    store.drop(WEB)
    assert store.get(WEB) is None and asked == [WEB, WEB]

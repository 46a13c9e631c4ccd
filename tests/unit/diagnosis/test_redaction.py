# SPDX-License-Identifier: Apache-2.0
"""Secrets that were planted never survive, in whatever form; what helps to understand a node does."""

from __future__ import annotations

import json
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.diagnosis.redaction import REMOVED, text, value, without_addresses

# Letters that occur in no other word of what is written around them.
SECRETS = st.text("QXZ" + string.digits, min_size=12, max_size=40).map(lambda one: f"Zq{one}")
NAMES = st.sampled_from(
    [
        "token", "access_token", "SLUICE_KUBE_TOKEN", "registry-password", "passwd", "DB_PASSWORD_2", "clientSecret",
        "secretKey", "api_key", "API-KEY", "client-key-data", "client-certificate-data", "aws_secret_access_key",
        "Authorization", "x-auth", "privateKey", "credentials", "Set-Cookie", "k8s_auth_token", "passphrase",
    ]
)  # fmt: skip
AROUND = st.text(string.ascii_lowercase + " \n.", max_size=40)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(string.ascii_lowercase, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_lowercase, max_size=6), inner),
    max_leaves=8,
)
FORMS = {
    "yaml": "{name}: {secret}\n",
    "yaml, quoted": '{name}: "{secret}"\n',
    "yaml, single": "{name}: '{secret}'\n",
    "yaml, block": "{name}: |\n  {secret}\n  {secret}\nnext: 1\n",
    "yaml, folded": "{name}: >-\n    {secret}\nnext: 1\n",
    "yaml, list": "{name}:\n  - {secret}\nnext: 1\n",
    "json": '{{"a": 1, "{name}": "{secret}", "b": 2}}',
    "json, close": '{{"{name}":"{secret}"}}',
    "json, escaped": '{{"config": "{{\\"{name}\\": \\"{secret}\\"}}"}}',
    "json, with a quote in it": '{{"{name}": "a\\"{secret}"}}',
    "json, list": '{{"{name}": ["{secret}", "{secret}"]}}',
    "environment": "PATH=/bin {name}={secret} HOME=/root\n",
    "environment, quoted": "export {name}='{secret} {secret}'\n",
    "flag": "prog --{name}={secret} --other=1",
    "flag, apart": "prog --{name} {secret} --other 1",
    "header": "GET / HTTP/1.1\r\n{name}: {secret}\r\nHost: x\r\n",
    "words": "{name}: {secret} {secret} and more",
    "words with commas": "{name}: a,{secret};{secret}}} and more",
    "equals with commas": "{name}=a,{secret};{secret}}} and-more",
    "toml": '{name} = "{secret}"\n',
}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40)
@given(name=NAMES, secret=SECRETS, before=AROUND, after=AROUND)
def test_what_stands_under_a_secrets_name_never_survives(
    form: str, name: str, secret: str, before: str, after: str
) -> None:
    clean = text(f"{before}\n{FORMS[form].format(name=name, secret=secret)}\n{after}")
    assert secret not in clean
    assert REMOVED in clean


@given(secret=SECRETS, before=AROUND, after=AROUND)
def test_secrets_that_are_known_by_their_form_never_survive(secret: str, before: str, after: str) -> None:
    body = (secret * 20)[:200]
    for words in (
        f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n{body}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN CERTIFICATE-----\\n{body}\\n-----END CERTIFICATE-----",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{body}",
        f"eyJhbGciOi{secret}.eyJzdWIi{secret}.{secret}",
        f"Authorization: Bearer {secret}",
        f"authorization: basic {secret}",
        f"curl -H 'authorization: Bearer {secret}' https://10.0.0.1",
        f"https://admin:{secret}@registry.example/path",
        f"K10{secret}::server:{secret}",
        f"ghp_{secret}",
    ):
        assert secret not in text(f"{before} {words} {after}"), words


@given(given_value=JSONS, name=NAMES, secret=SECRETS, inside=st.sampled_from(["text", "list", "map"]))
def test_values_under_a_secrets_name_go_whole(given_value: object, name: str, secret: str, inside: str) -> None:
    planted: object = {"text": secret, "list": [secret, {"x": secret}], "map": {"user": secret}}[inside]
    clean = json.dumps(value({"spec": [{name: planted}, given_value], "other": given_value}))
    assert secret not in clean


@given(secret=SECRETS, key=st.sampled_from(["example.com/note", "kubectl.kubernetes.io/last-applied-configuration"]))
def test_of_annotations_those_stay_that_sluice_reads(secret: str, key: str) -> None:
    ours = {"istio.io/dataplane-mode": "ambient", "traffic.sluice.io/exclude-outbound-ports": "9000"}
    clean = value({"annotations": {**ours, key: secret}, "labels": {"app": "cart", key: "stays"}})
    assert clean["annotations"] == {**ours, key: REMOVED}
    assert clean["labels"] == {"app": "cart", key: "stays"}


def test_what_is_no_secret_stays() -> None:
    words = (
        "kube_token_file: /var/run/secrets/kubernetes.io/serviceaccount/token\n"
        "secretName: web-tls\nauthor: bob\nready: true\nthe token could not be read: Permission denied\n"
        "net.ipv4.ip_forward = 1\ntcp dport != 15008 counter redirect to :15006 comment \"sluice:abc\"\n"
        "token: null\npassword: \"\"\n"
    )  # fmt: skip
    assert text(words) == words
    taken = {"kube_token_file": "/a/token", "backend": "auto", "trust_domain": "cluster.local", "tokens_total": 3}
    assert value(taken) == taken


def test_json_and_yaml_stay_what_they_are() -> None:
    given_value = {"a": 1, "password": "x y", "nested": [{"token": "t", "b": "c"}]}
    assert json.loads(text(json.dumps(given_value, indent=1)))["nested"] == [{"token": REMOVED, "b": "c"}]
    assert yaml.safe_load(text('user: bob\npassword: "x y"\n')) == {"user": "bob", "password": REMOVED}


@given(st.ip_addresses(), st.sampled_from(["{}", "[{}]:80", "{}/24 dev", "from {}, to", "{}.", '"{}"']))
def test_addresses_are_replaced_by_the_same_word_throughout(address: object, form: str) -> None:
    shown = form.format(address)
    clean = without_addresses(f"{shown}\nagain {address}", "salt")
    first = clean.splitlines()[1].removeprefix("again ")
    if first == str(address):  # loopback and the like
        return
    assert str(address) not in clean
    assert clean.splitlines()[0] == form.format(first)
    assert first not in without_addresses(f"again {address}", "another salt")


def test_what_is_the_same_everywhere_keeps_its_address() -> None:
    words = "127.0.0.1 ::1 0.0.0.0 169.254.7.127 12:30:45 at 15:04, sluice:d8e78ad8361b, a::b"
    assert without_addresses(words, "s").startswith("127.0.0.1 ::1 0.0.0.0 169.254.7.127 12:30:45 at 15:04, sluice:d8")
    assert without_addresses("10.0.0.1:80 ::ffff:10.0.0.1 fe80::1%eth0 aa:bb:cc:dd:ee:ff", "s").count("10.0.0.1") == 0
    assert "aa:bb" not in without_addresses("link/ether aa:bb:cc:dd:ee:ff brd", "s")

# SPDX-License-Identifier: Apache-2.0
"""Layer 4 policies: what matches, which action wins, and policies with nothing in them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from agent.ztunnel.mesh import local_mesh
from agent.ztunnel.mesh.authorization import PolicyConnection, Verdict, decide
from agent.ztunnel.tls.spiffe import parse

WEB = "spiffe://cluster.local/ns/shop/sa/web"
NO_ALLOW = "no ALLOW policy matches the connection"


def verdict(*policies: str, identity: str = WEB, port: int = 80, source: str = "10.0.0.1") -> Verdict:
    """Policies as NAME ACTION RULES, the rules as in a mesh file; a name that ends in ~ is a dry run."""
    text = ""
    for policy in policies:
        name, action, rules = policy.split(" ", 2)
        text += (
            f"- {{name: {name.rstrip('~')}, namespace: shop, scope: Namespace, action: {action},"
            f" dryRun: {str(name.endswith('~')).lower()}, rules: {rules}}}\n"
        )
    mesh = local_mesh.parse(f"policies:\n{text}" if text else "policies: []\n")
    connection = PolicyConnection(ip_address(source), ip_address("10.0.0.2"), port, parse(identity))
    return decide(mesh.policies, connection)


PRINCIPAL = "[[[{principals: [!Exact cluster.local/ns/shop/sa/web]}]]]"


def test_without_policies_everything_is_allowed_and_an_allow_excludes_the_rest() -> None:
    assert verdict() == Verdict(True)
    assert verdict(f"a Allow {PRINCIPAL}") == Verdict(True, "shop/a")
    other = verdict(f"a Allow {PRINCIPAL}", identity=WEB.replace("/web", "/other"))
    assert other == Verdict(False, "", NO_ALLOW)


def test_a_deny_comes_before_every_allow() -> None:
    found = verdict(f"a Allow {PRINCIPAL}", "d Deny [[[{destinationPorts: [80]}]]]")
    assert found == Verdict(False, "shop/d", "denied by policy shop/d")
    assert verdict("d Deny [[[{destinationPorts: [22]}]]]") == Verdict(True)


@pytest.mark.parametrize("rules", ["[]", "[[[{}]]]"], ids=["no rules", "an empty match"])
def test_a_policy_of_no_rules_matches_nothing(rules: str) -> None:
    assert verdict(f"a Allow {rules}") == Verdict(False, "", NO_ALLOW)
    assert verdict(f"d Deny {rules}") == Verdict(True)


def test_an_empty_clause_always_matches() -> None:
    assert verdict("a Allow [[[]]]") == Verdict(True, "shop/a")


def test_without_an_identity_no_principal_matches() -> None:
    assert not verdict("a Allow [[[{principals: [!Prefix cluster]}]]]", identity="").allowed
    assert not verdict("a Allow [[[{principals: [Presence]}]]]", identity="").allowed
    assert verdict("a Allow [[[{notPrincipals: [!Prefix cluster]}]]]", identity="").allowed
    assert not verdict("a Allow [[[{namespaces: [!Exact shop]}]]]", identity="").allowed


@pytest.mark.parametrize(
    ("match", "allowed"),
    [
        ("{namespaces: [!Exact shop], destinationPorts: [80]}", True),  # AND of fields
        ("{namespaces: [!Exact shop], destinationPorts: [22]}", False),
        ("{destinationPorts: [22, 80]}", True),  # OR of values
        ("{destinationPorts: [80], notSourceIps: [10.0.0.0/8]}", False),
        ("{sourceIps: [10.0.0.0/8], notNamespaces: [!Suffix x]}", True),
        ("{serviceAccounts: [{namespace: shop, serviceAccount: web}]}", True),
        ("{serviceAccounts: [{namespace: shop, serviceAccount: we}]}", False),
    ],
)
def test_the_fields_of_a_match(match: str, allowed: bool) -> None:
    assert verdict(f"a Allow [[[{match}]]]").allowed is allowed


def test_matches_are_alternatives_clauses_are_not_rules_are() -> None:
    one, other = "{destinationPorts: [80]}", "{destinationPorts: [22]}"
    assert verdict(f"a Allow [[[{other}, {one}]]]").allowed
    assert not verdict(f"a Allow [[[{other}], [{one}]]]").allowed
    assert verdict(f"a Allow [[[{other}]], [[{one}]]]").allowed


def test_a_dry_run_is_named_and_decides_nothing() -> None:
    assert verdict("d~ Deny [[[{destinationPorts: [80]}]]]") == Verdict(True, dry_run=("shop/d",))
    assert verdict("a~ Allow [[[{destinationPorts: [22]}]]]") == Verdict(True, dry_run=("shop/a",))

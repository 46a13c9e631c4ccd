# SPDX-License-Identifier: Apache-2.0
"""Allows or denies connections: Istio's AuthorizationPolicy at layer 4. Pure.

Any matching DENY refuses; else any matching ALLOW allows; else a connection is allowed unless there is an ALLOW policy.
An empty list of rules never matches, neither does an empty match; an empty clause always does. A connection without
identity never matches a principal, and its namespace is "".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

from agent.ztunnel.mesh.mesh_model import (
    Authorization,
    AuthorizationAction,
    AuthorizationMatch,
    StringMatch,
)
from agent.ztunnel.tls.spiffe import SpiffeId

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PolicyConnection:
    """The properties of a connection that policies compare.

    `source` is the TCP peer, `port` the application's port and not that of HBONE; `identity` is from mutual TLS.
    """

    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    port: int
    identity: SpiffeId | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result. `policy` is the namespace/name that decided, "" if none did; `dry_run` are those that would deny."""

    allowed: bool
    policy: str = ""
    reason: str = ""
    dry_run: tuple[str, ...] = ()


def decide(policies: Sequence[Authorization], connection: PolicyConnection) -> Verdict:
    """Returns the verdict of all policies that select the destination."""
    dry_run = tuple(policy.key for policy in policies if policy.dry_run and _would_deny(policy, connection))
    live = [policy for policy in policies if not policy.dry_run]
    for policy in live:
        if policy.action is AuthorizationAction.DENY and matches(policy, connection):
            return Verdict(False, policy.key, f"denied by policy {policy.key}", dry_run)
    allows = [policy for policy in live if policy.action is AuthorizationAction.ALLOW]
    for policy in allows:
        if matches(policy, connection):
            return Verdict(True, policy.key, dry_run=dry_run)
    if allows:
        return Verdict(False, "", "no ALLOW policy matches the connection", dry_run)
    return Verdict(True, dry_run=dry_run)


def _would_deny(policy: Authorization, connection: PolicyConnection) -> bool:
    return matches(policy, connection) is (policy.action is AuthorizationAction.DENY)


def matches(policy: Authorization, connection: PolicyConnection) -> bool:
    """Returns True if one rule of the policy matches the connection."""
    return any(all(_clause(clause, connection) for clause in rule) for rule in policy.rules)


def _clause(clause: Sequence[AuthorizationMatch], connection: PolicyConnection) -> bool:
    return not clause or any(_match(one, connection) for one in clause)


def _match(match: AuthorizationMatch, connection: PolicyConnection) -> bool:
    if match.empty:
        return False
    required = match.required
    forbidden = match.forbidden
    identity = connection.identity
    namespace = identity.namespace if identity else ""
    principal = str(identity).removeprefix("spiffe://") if identity else None

    def is_principal(pattern: StringMatch) -> bool:
        return principal is not None and pattern.matches(principal)

    return (
        _holds(required.destination_ips, forbidden.destination_ips, lambda net: connection.destination in net)
        and _holds(required.source_ips, forbidden.source_ips, lambda net: connection.source in net)
        and _holds(required.destination_ports, forbidden.destination_ports, lambda port: port == connection.port)
        and _holds(
            required.service_accounts,
            forbidden.service_accounts,
            lambda account: (
                identity is not None
                and (account.namespace, account.service_account) == (identity.namespace, identity.service_account)
            ),
        )
        and _holds(required.principals, forbidden.principals, is_principal)
        and _holds(required.namespaces, forbidden.namespaces, lambda pattern: pattern.matches(namespace))
    )


def _holds(required: Sequence[T], forbidden: Iterable[T], matches_one: Callable[[T], bool]) -> bool:
    return (not required or any(map(matches_one, required))) and not any(map(matches_one, forbidden))

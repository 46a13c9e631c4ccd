# SPDX-License-Identifier: Apache-2.0
"""Redirect: what one pod's traffic must do; the contract between policy and kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

from agent.core import names
from agent.core.model.exclusions import NOTHING, Exclusions


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """The intent for one pod. Holds nothing of the pod itself, so all pods of a variant share one value.

    `virtual_interfaces` are names of interfaces with inbound traffic that counts as outbound. `dns_to` are the
    resolvers for which DNS is captured, () for all. `preserve`: connections from before the rules run on outside, see
    core.model.preexisting. `refuse_non_tcp`: traffic that is neither TCP nor DNS is refused, not only counted.
    `hbone`: ztunnel listens on 15008 in the pod, so what comes in there is left to it; else it is captured.
    `blocked`: a process of the pod has a port of ztunnel's, so what rules would redirect there is dropped.
    `marks`: packets are distinguished by marks, which a policy rule and a route serve. `draining`: nothing new is
    captured, and what is captured already goes on as it does.
    """

    ipv4: bool = True
    ipv6: bool = True
    dns: bool = True
    ingress_only: bool = False
    virtual_interfaces: tuple[str, ...] = ()
    probe_ipv4: str = names.PROBE_IPV4
    probe_ipv6: str = names.PROBE_IPV6
    dns_to: tuple[str, ...] = ()
    exclude: Exclusions = NOTHING
    refuse_non_tcp: bool = False
    hbone: bool = True
    blocked: bool = False
    preserve: bool = False
    marks: bool = True
    draining: bool = False

    def within(self, *, ipv6: bool) -> Redirect:
        """Returns the same intent in a namespace that has IPv6, or has it switched off."""
        return self if ipv6 or not self.ipv6 else replace(self, ipv6=False)

# SPDX-License-Identifier: Apache-2.0
"""Sluice: a node agent that takes the traffic of pods through one layer 4 proxy per node.

Facts about pods flow in at the top, become one desired value per pod, are compared with what the kernel
holds, and leave as one atomic change:

    sources -> PodTable -> decide() -> Redirect -> plan(want, have) -> apply -> read again -> ztunnel, status

core        pure values and decisions: pods, Redirect, desired, Plan, schedule, status, settings, names
kernel      IO without decisions, a file per mechanism: namespaces, netlink, processes
backends    the mechanisms that make a Redirect true in a namespace, four verbs each
sources     where pods come from (CNI plugin, static file, state on disk) and what wakes the reconciler
zds         how pods are handed to ztunnel
reconciler  takes due pods: read, plan, apply, read again, publish, report
export      metrics, health and the admin API
ztunnel     the embedded proxy, a process of its own
lab         nodes, pods, traffic and faults in network namespaces
cli         one file per command group; app joins the parts of the agent
"""

__version__ = "0.1.0"

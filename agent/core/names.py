# SPDX-License-Identifier: Apache-2.0
"""Every mark, port, chain, table and path that others see, each with its reason.

The values of tables, chains, marks and ports are those of the existing ambient agents, so that Sluice can
adopt pods that they programmed and they can adopt ours (docs/design/rules.md).
"""

from __future__ import annotations

from typing import Final

# Ports on which ztunnel listens inside each pod's network namespace.
OUTBOUND_PORT: Final = 15001  # captured egress
INBOUND_PORT: Final = 15006  # captured plaintext ingress
HBONE_PORT: Final = 15008  # already meant for ztunnel: never redirected
DNS_PORT: Final = 15053  # captured DNS, udp and tcp
# Ports of a ztunnel with a mesh, Istio's and the embedded one, in its own network namespace.
ZTUNNEL_ADMIN_PORT: Final = 15000
ZTUNNEL_STATS_PORT: Final = 15020
ZTUNNEL_READY_PORT: Final = 15021

# The mark on every socket that ztunnel opens, and the connection mark of what it touched.
ZTUNNEL_MARK: Final = 0x539
CONNECTION_MARK: Final = 0x111
MARK_MASK: Final = 0xFFF

# Marked replies are delivered locally: "fwmark 0x111/0xfff lookup 100" and "local default dev lo table 100". For
# sockets that are bound to an interface: "to 127.0.0.0/8 lookup 100" and "local default dev eth0 table 100".
ROUTE_TABLE: Final = 100
RULE_PREFERENCE: Final = 32764
# Where table 100 has foreign routes, or a foreign policy rule leads there: the first free one of these.
SPARE_TABLES: Final = (13370, 13371, 13372, 13373)
# Where rules send connections and DNS queries to ztunnel, within the pod.
LOOPBACK: Final = {4: "127.0.0.0/8", 6: "::1"}
# Protocol number of routes and policy rules that we made; no routing program of rt_protos has it.
ROUTING_PROTOCOL: Final = 83

PROBE_IPV4: Final = "169.254.7.127"
PROBE_IPV6: Final = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"

# Never captured on the way out: an address of the link that only its interface makes one, which ztunnel cannot name.
LINK_LOCAL: Final = "fe80::/10"

# DNS sockets of ztunnel live in a conntrack zone of their own, so that the pod and ztunnel may use the same
# source port towards the same resolver without meeting in conntrack.
DNS_ZONE: Final = 1

# iptables chains and nftables tables and chains in a pod.
XT_PREROUTING: Final = "ISTIO_PRERT"
XT_OUTPUT: Final = "ISTIO_OUTPUT"
NFT_TABLE_PREFIX: Final = "istio-ambient-"  # followed by nat, mangle or raw
NFT_PREROUTING: Final = "istio-prerouting"
NFT_OUTPUT: Final = "istio-output"

TAG_PREFIX: Final = "sluice:"  # of the comment of every rule of Sluice; see core.model.ownership

# Labels and annotations (docs/design/interfaces.md).
DATAPLANE_MODE: Final = "istio.io/dataplane-mode"
SIDECAR_STATUS: Final = "sidecar.istio.io/status"
BYPASS_INBOUND: Final = "ambient.istio.io/bypass-inbound-capture"
DNS_CAPTURE: Final = "ambient.istio.io/dns-capture"
REROUTE_INTERFACES: Final = "istio.io/reroute-virtual-interfaces"
# Of a pod on a node without Kubernetes, where no API has its service account; without it the default of Kubernetes.
POD_ACCOUNT: Final = "sluice.io/service-account"
DEFAULT_ACCOUNT: Final = "default"

RUN_DIR: Final = "/run/sluice"
BPF_DIR: Final = "/sys/fs/bpf/sluice"
NON_TCP_MAP: Final = "beside"  # the name of its pin: an upgrade continues the counts of the version before
# The maps of bpf/maps.h and bpf/account_maps.h with sizes that are settings; `records` in bytes.
BPF_MAPS: Final = (
    "pods", "policies", "ztunnels", "listeners", "handover", "resolvers", "flows", NON_TCP_MAP,
    "begun", "spoken", "late", "tallies", "rest", "exported", "qualities", "records",
)  # fmt: skip
ZDS_SOCKET: Final = "/var/run/ztunnel/ztunnel.sock"
SERVICE_ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"  # where the kubelet puts a pod's credentials

# Written on a pod's status subresource, for istiod and people (docs/design/interfaces.md).
REDIRECTION: Final = "ambient.istio.io/redirection"

CNI_TYPE: Final = "sluice-cni"
CNI_CONF: Final = "02-sluice.conflist"  # sorts before what primary plugins install
CNI_PLUGIN: Final = "/usr/local/lib/sluice/sluice-cni"  # where the image has the plugin's binary

# SPDX-License-Identifier: Apache-2.0
"""The embedded ztunnel: a separate process that carries the captured connections of this node's pods.

app starts and ends it; zds_client speaks ZDS with the agent; workloads holds the pods. relay accepts and connects in
the pods and moves bytes, hbone does so through tunnels, tls has identities and certificates, mesh decides where
connections go (mesh_router asks it), control speaks with the control plane, dns answers and forwards queries, telemetry
reports connections.
"""

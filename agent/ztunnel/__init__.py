# SPDX-License-Identifier: Apache-2.0
"""The embedded ztunnel: a separate process that carries the captured connections of this node's pods.

app starts and ends it; zds_client speaks ZDS with the agent; workloads holds the pods. relay accepts and connects in
the pods and moves bytes, dns forwards queries, telemetry reports connections.
"""

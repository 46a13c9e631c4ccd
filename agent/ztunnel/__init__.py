# SPDX-License-Identifier: Apache-2.0
"""The embedded ztunnel: a separate process that carries the captured connections of this node's pods.

app starts and ends it; client speaks ZDS with the agent; workloads holds the pods and workload one pod's listeners;
connection is one proxied connection, relay moves its bytes, upstream opens sockets inside the pod, original_dst finds
the destination of a connection, dns_origin the resolver of a query, and dns forwards queries; poller has readiness and
deadlines; records writes a line per connection.
"""

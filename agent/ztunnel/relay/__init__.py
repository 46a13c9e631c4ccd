# SPDX-License-Identifier: Apache-2.0
"""Connections inside the pods.

pod_listener holds one pod's listeners, which pod_sockets opens, and pod_context what the pod's connections share;
held_connections holds those that come before the mesh knows the pod; proxied_connection is one connection, splice moves
its bytes, upstream opens sockets inside the pod, original_dst finds the destination of a connection, keepalive lets the
far end be probed; poller has readiness and deadlines.
"""

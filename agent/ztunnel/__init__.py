"""The embedded ztunnel: a process of its own that carries the captured connections of this node's pods.

app starts and ends it; client speaks ZDS with the agent; workloads holds the pods and workload one pod's
listeners; connection is one proxied connection, relay moves its bytes, upstream opens sockets inside the pod,
original finds where a connection was going, dns does the same for queries; poller and deadlines wake them;
records tells what happened.
"""

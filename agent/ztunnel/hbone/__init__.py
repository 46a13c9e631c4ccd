# SPDX-License-Identifier: Apache-2.0
"""HBONE: connections as CONNECT streams of HTTP/2 over mutual TLS.

frames splits bytes into frames, session_core keeps one HTTP/2 session, tls_codec turns bytes into TLS records and back,
all three without IO; tls_session joins them with a session_transport: a socket or, for an inner_session behind a
gateway, a stream of another session. stream_relay moves bytes between a stream and a socket:
outbound_stream opens the stream for a captured connection, inbound_stream accepts it, both by connect_request.
pod_sessions holds the sessions of one pod, of which pool chooses one for a new stream. tunnels joins them with the pods
of an event loop. next_hop has the decisions that it asks for, limits the bounds against hostile peers.
"""

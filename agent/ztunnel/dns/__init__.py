# SPDX-License-Identifier: Apache-2.0
"""DNS of the pods.

forwarding relays queries by UDP, dns_connection those by TCP, which dns_framing cuts into messages; pending_query asks
mesh_names first, for which dns_answers makes the answers; dnsmessage reads messages.
"""

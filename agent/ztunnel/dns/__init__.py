# SPDX-License-Identifier: Apache-2.0
"""DNS of the pods: forwarding relays queries, dns_origin finds the resolver of a query, dnsmessage reads messages."""

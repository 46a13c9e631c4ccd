# SPDX-License-Identifier: Apache-2.0
"""DNS queries of the pods.

dns_account reads copies of their packets, queries joins each query with its answer, summary says what stands out.
"""

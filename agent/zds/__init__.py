# SPDX-License-Identifier: Apache-2.0
"""ZDS: the protocol by which the agent hands pod network namespaces to a ztunnel."""

# SPDX-License-Identifier: Apache-2.0
"""nftables by our own nfnetlink messages: one transaction per change, one table set for both families."""

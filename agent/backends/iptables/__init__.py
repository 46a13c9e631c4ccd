# SPDX-License-Identifier: Apache-2.0
"""iptables on nf_tables: written by iptables-restore, one process per family, read back by nfnetlink."""

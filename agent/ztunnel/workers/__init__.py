# SPDX-License-Identifier: Apache-2.0
"""The worker processes of ztunnel: one supervisor, which the agent knows, and what it forks."""

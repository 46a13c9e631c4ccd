# SPDX-License-Identifier: Apache-2.0
"""Moves one node from istio-cni to Sluice and back: its facts, the differences, and the steps."""

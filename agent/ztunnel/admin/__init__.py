# SPDX-License-Identifier: Apache-2.0
"""The HTTP ports of a mesh's ztunnel: statistics, readiness, and the configuration for istioctl."""

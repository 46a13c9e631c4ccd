# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes API: reads this node's pods and writes their annotations, events and conditions."""

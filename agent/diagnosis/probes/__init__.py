# SPDX-License-Identifier: Apache-2.0
"""The probes, one module per group of facts: the only part of this package that reads the node."""

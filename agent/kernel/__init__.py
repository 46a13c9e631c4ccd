# SPDX-License-Identifier: Apache-2.0
"""IO without decisions, a file per kernel mechanism."""

# SPDX-License-Identifier: Apache-2.0
"""Pure values and decisions: no IO, no clock, no logging."""

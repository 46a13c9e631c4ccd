# SPDX-License-Identifier: Apache-2.0
"""Measures the aims of docs/performance.md: `python -m tests.bench`. Nothing here is a test or asserts."""

"""Measures the aims of docs/performance.md: `python -m tests.bench`. Nothing here is a test or asserts."""

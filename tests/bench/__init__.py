"""What the design promises, measured: `python -m tests.bench`. Nothing here is a test; nothing here asserts."""

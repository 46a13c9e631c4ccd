"""The probes, one module per group of facts: the only part of this package that reads the node."""

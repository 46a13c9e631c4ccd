"""The checks, one module per part of a node. Pure."""

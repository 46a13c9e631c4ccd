"""The checks, a module for each part of a node. Pure."""

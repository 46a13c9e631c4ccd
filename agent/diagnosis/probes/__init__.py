"""The looks, a module for each group of facts: the only part of this room that asks a node anything."""

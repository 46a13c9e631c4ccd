"""IO without decisions, a file per kernel mechanism."""

"""The command line: one file per command group. Nouns read, verbs change.

Exit codes: 0 fine, 1 something is wrong with what was looked at (drift), 2 the command could not do its work.
"""

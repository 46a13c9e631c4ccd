# SPDX-License-Identifier: Apache-2.0
"""The command line: one file per command group. Nouns read, verbs change.

Exit codes: 0 success, 1 something examined is wrong (drift), 2 the command could not do its work.
"""

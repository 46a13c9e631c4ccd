# SPDX-License-Identifier: Apache-2.0
"""Takes due pods: read, plan, apply, read again, publish to ztunnel, report. Knows only backends.base."""

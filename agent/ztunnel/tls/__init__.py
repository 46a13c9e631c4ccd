# SPDX-License-Identifier: Apache-2.0
"""Identities, certificates and what is checked of a peer's."""

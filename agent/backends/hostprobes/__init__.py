# SPDX-License-Identifier: Apache-2.0
"""The node's own probes of enrolled pods, known in the pods by their source address. For the host's namespace."""

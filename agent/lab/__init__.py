# SPDX-License-Identifier: Apache-2.0
"""The lab: nodes, pods, a real CNI chain, programs and traffic, all in network namespaces of one machine."""

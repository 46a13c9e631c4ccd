# SPDX-License-Identifier: Apache-2.0
"""The sources of facts about pods: CNI calls, Kubernetes, the static file, and running pods."""

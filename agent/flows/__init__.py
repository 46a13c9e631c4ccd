# SPDX-License-Identifier: Apache-2.0
"""The fate of every connection of enrolled pods: collected in the kernel, exported as records and totals."""

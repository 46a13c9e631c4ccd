# SPDX-License-Identifier: Apache-2.0
"""Mechanisms that make a Redirect true in a target: four verbs each (base), chosen by `choose`."""

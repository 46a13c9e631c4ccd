"""Mechanisms that make a Redirect true in a target: five verbs each (base), chosen by `choose`."""

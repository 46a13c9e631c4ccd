"""The composition root of `sluice agent`: root joins the parts, the other modules build some of them."""

from agent.app.root import main

__all__ = ["main"]

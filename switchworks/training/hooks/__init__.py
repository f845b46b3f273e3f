"""Hooks: what happens beside training. `loop.py` has the protocol."""

"""Held-out loss while training."""

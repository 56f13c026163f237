"""Ranks, devices, and how a run is launched on them."""

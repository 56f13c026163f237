"""Checkpoints on disk: written, verified, kept, found again."""

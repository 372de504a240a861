"""Checkpoints: saved with a digest, verified when restored."""

"""Pallas kernels for TPUs: attention and relation losses that keep the maps of all pairs of tokens in VMEM."""

"""Figures of a checkpoint: evaluation, k-NN, linear probe, prediction."""

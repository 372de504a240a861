"""Masked autoencoding."""

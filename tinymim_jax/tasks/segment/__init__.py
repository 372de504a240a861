"""Semantic segmentation: an encoder and a head learn the class of every pixel."""

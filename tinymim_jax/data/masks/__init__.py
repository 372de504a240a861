"""Masks of semantic segmentation: their files, their classes, and what is wrong with them."""

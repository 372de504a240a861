"""Decodes images and makes views (crops, flips, RandAugment) of them, on the CPU."""

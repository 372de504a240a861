"""TFDS builders for data sets that are not part of TFDS."""

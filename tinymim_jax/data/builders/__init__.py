"""TFDS builders of sets that TFDS itself does not carry."""

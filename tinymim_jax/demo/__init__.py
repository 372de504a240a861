"""The whole method on handwritten digits."""

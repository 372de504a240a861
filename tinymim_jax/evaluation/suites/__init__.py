"""Test suites: ImageNet and its variants, and labelled sets of one's own."""

"""Experiments. Each file has get_config(), which changes a few keys of configs/base.py."""

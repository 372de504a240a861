"""Experiments. Each file has a function get_config() that changes some keys of configs/base.py."""

"""Writes a data set as ArrayRecord files, once."""

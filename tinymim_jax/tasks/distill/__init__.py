"""Distillation of token relations or features."""

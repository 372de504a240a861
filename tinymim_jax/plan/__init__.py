"""Estimates memory and speed of a training on absent hardware, by compiling its step for that hardware."""

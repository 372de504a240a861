"""The input pipeline on the host: reads stored images and makes uint8 batches. It does not import jax."""

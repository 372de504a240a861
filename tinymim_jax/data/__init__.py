"""Images on the host, from stored bytes to uint8 batches; knows nothing of jax or of models."""

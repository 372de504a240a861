"""Image data sources: TFDS, folders, tar, Parquet, ArrayRecord."""

"""Where images lie: TFDS, folders, tar, Parquet, ArrayRecord."""

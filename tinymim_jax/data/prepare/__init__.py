"""`tinymim prepare --output`: converts a source of images into a TFDS data set of ArrayRecord files."""

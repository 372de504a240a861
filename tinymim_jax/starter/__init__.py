"""From a folder of images to a small network: what `tinymim distill` looks at, chooses, checks and runs."""

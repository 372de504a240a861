"""`tinymim distill` and `tinymim advise`: checks, choices, measurements and the commands that they run."""

"""The `tinymim` command, one file for each subcommand."""

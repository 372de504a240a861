"""`python -m tinymim_jax` is `tinymim`."""

from tinymim_jax.cli.main import main

if __name__ == "__main__":
    main()

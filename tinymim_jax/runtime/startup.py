"""What every process of ours does before its first step: logging, and the cache of compiled programs."""

import logging
import os
import sys

from tinymim_jax.runtime.exits import is_first, process_label


def start_logging(prefix: str = "") -> None:
    """Our progress goes to standard output, each line behind `prefix`; other libraries speak up from warnings on."""
    line = f"%(asctime)s {prefix}%(message)s"
    # Some libraries configure logging on import; whoever starts a process decides.
    logging.basicConfig(level=logging.WARNING, format=line, datefmt="%H:%M:%S", stream=sys.stdout, force=True)
    logging.getLogger("tinymim_jax").setLevel(logging.INFO)


def quiet_unless_first() -> None:
    """Of a job of several processes, those behind the first speak up from warnings on, and say which they are."""
    if not is_first():
        start_logging(process_label().strip() + " ")
        logging.getLogger("tinymim_jax").setLevel(logging.WARNING)


def use_compile_cache(directory: str) -> None:
    """Keeps compiled programs in `directory` for the next run; "" keeps none."""
    import jax

    if directory:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

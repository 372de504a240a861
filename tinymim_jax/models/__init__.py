"""Networks (flax.linen): they know no task, no data and no configuration file."""

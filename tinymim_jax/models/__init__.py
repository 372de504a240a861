"""Networks (flax.linen), independent of tasks, data and configuration files."""

"""Arrays in, arrays out: the mathematics, with no modules and no configuration."""

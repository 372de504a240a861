"""report.html: what happened in a run, a sweep, a chain or an evaluation, in one file that needs no network."""

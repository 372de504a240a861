"""Many trainings: sweeps, chains and studies."""

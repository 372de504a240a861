"""Evaluation of checkpoints: on their own task, on test suites, by k-NN and linear probe; and inference."""

"""Evaluation of classifiers on test suites: ImageNet's test sets, and labelled sets of the user."""

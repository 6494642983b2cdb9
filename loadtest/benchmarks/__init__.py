"""Measurements of single parts, which the documentation quotes; run one as `python -m loadtest.benchmarks.NAME`."""

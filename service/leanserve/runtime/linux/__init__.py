"""Tuning of the machine, each part with one call site."""

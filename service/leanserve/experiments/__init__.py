"""Which of two variants is better, decided from live traffic: the arithmetic, without any serving.

Everything here is plain state and pure functions of it. Sums go in (`evidence`), may be added up over processes and
restarts, and a verdict comes out at any time (`verdict`), which moves traffic (`ramp`). `store` alone touches a file.
docs/experiments.md has the formulas and what they promise.
"""

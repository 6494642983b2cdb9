"""leanserve: bring a model, get the cheapest variant that still answers right, proven on your own traffic."""

__version__ = "0.1.0"

"""Load on a running leanserve: `locustfile.py` makes it, `compare.py` turns it into an A/B table."""

"""Experiments on live traffic: a fleet feeds the statistics of `experiments`, and what they decide moves its traffic.

A director (`director.py`) runs one experiment at a time. Batches of the base are answered again in idle time
(`shadows.py`, `rerun.py`), answers are compared and the evidence is judged on one thread beside the loop
(`comparing.py`, `looking.py`), and what comes of it is kept in SQLite, told by documents and by metrics.
"""

"""Scores by which answers are judged against labels that are neither classes nor numbers: one file per kind of task."""

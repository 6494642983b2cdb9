"""The parts of the quality report: what is said (`summary`), in which words and columns, and how it is drawn."""

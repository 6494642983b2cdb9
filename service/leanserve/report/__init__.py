"""Quality and cost of the variants, for the terminal and as one page."""

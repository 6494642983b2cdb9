"""Whether a variant still answers right, and what it costs; measured in processes of their own."""

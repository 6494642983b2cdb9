"""The passes, one file each, by family."""

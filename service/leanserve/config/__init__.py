"""The one YAML file: its sections, and errors with their line."""

"""Torch modules that the service puts around brought ones. Import torch at the top: they are imported when needed."""

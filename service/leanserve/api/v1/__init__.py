"""leanserve's own endpoints."""

"""One file per way of bringing a model."""

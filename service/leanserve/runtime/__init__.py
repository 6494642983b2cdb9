"""Everything that runs a model: backends, the device and its lanes, warm-up, measured costs."""

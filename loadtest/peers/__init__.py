"""leanserve beside other servers: `compare.py` (a tiny network) and beside bare onnxruntime: `saturation.py`."""

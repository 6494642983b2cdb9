"""Running on NVIDIA GPUs: which there are, streams and graphs of torch, replicas on several, and how they fail."""

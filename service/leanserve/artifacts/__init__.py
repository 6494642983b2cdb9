"""What passes produced, on disk: the store, its manifests, loading."""

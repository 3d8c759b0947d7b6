"""Results on disk: manifests, fingerprints, the run directory and its lock."""

"""A snapshotter for containerd: images become the root filesystems of containers, lazily where that works."""

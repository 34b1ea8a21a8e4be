"""Our own transport on /dev/fuse: no libfuse, a few microseconds for each request."""

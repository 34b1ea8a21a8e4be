"""From a directory or a tar stream to blobs and a bootstrap, and back."""

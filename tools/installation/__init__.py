"""Writing nydus-py's units and settings on a host, and taking them away again."""

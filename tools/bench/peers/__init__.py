"""The bench of the peers: hosts in namespaces, shaped links, a real registry."""

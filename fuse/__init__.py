"""Mounting: the transport-free filesystem and the drivers on it."""

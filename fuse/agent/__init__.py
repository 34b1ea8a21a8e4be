"""The agent: one process that serves all mounts of a host, under the supervisor."""

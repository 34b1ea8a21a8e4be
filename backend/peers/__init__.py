"""Hosts give each other what they have, so that the registry sends every byte once."""

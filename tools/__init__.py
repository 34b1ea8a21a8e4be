"""The nydus-py command line: one module per verb."""

"""Where bytes come from and where they are kept: registries, directories, layouts, the cache."""

"""How fast pods start: lazily from Nydus images, and from ordinary ones that are pulled first."""

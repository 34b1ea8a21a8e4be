"""RAFS v6: the image format. Pure: bytes in, values out."""

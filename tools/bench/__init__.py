"""`make bench`: nydus-py measured beside tar, zstd, mkfs.erofs, mksquashfs and ext4, in one run."""

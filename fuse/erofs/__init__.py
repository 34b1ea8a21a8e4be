"""Mounting with the kernel's EROFS; what its devices lack is filled in when fanotify says so."""

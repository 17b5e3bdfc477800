"""Published systems, one file each; the file is the only registration."""

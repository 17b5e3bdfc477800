"""Text systems."""

"""Signals become files and come back: the container, the range coder, and codecs that use them."""

"""Codecs of sound and speech."""

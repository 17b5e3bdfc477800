"""Command line doors."""

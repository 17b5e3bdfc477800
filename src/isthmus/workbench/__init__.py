"""Offline data and the small reference models that claims are measured on."""

"""Signals, pictures and tensors made small."""

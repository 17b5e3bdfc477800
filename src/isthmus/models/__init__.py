"""Generic assemblies and the adapter to transformers."""

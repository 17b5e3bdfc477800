"""How what is trained here is trained."""

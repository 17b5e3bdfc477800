"""One ruler for what systems make."""

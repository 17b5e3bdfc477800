"""Laws: what a measurement lets a user decide."""

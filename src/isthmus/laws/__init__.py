"""Laws: measured relations that let a user decide before spending."""

"""What `summer-trace` does."""

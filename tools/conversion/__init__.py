"""What `summer-convert` does."""

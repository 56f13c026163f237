"""What `summer-generate` does."""

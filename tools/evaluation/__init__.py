"""What `summer-eval` does."""

"""What `summer-report` does."""

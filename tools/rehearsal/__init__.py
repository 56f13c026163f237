"""What `summer-rehearse` does."""

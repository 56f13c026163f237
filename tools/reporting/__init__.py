"""What `summer-report` writes."""

"""What `summer-doctor` examines."""

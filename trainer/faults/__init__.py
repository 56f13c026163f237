"""What goes wrong in a run: noticed, survived, and injected by tests."""

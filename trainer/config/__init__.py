"""What is asked of a run, and whether it can be done."""

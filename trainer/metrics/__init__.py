"""What a step reports, on the screen and in files."""

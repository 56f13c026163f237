"""What a run reports: a step's numbers, events, seconds, profiles."""

"""AdamW and the learning-rate schedules."""

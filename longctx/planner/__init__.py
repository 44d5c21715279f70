"""What a stage takes before anything is started: memory, time, pictures of schedules, from plain data."""

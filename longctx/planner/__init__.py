"""The planner: estimates the memory and time of each stage and draws schedules, without starting anything."""

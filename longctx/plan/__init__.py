"""Memory and time of a stage before anything is started, and pictures of schedules: arithmetic on plain data."""

"""What a run looks like: the proof as one picture, and the static page around it."""

"""What everything else builds on: recipes, checkpoints, processes, random numbers, progress and logs."""

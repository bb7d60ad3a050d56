"""Pages made of what a run, or a scoring, has written."""

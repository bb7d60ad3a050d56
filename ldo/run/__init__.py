"""A run: what it holds, how it is validated and how it is loaded."""

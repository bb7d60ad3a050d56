"""Clips and prompts: folders, video files, Hugging Face datasets, buckets, and the cache of what was encoded."""

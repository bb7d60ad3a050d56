"""Video diffusion models behind one small protocol; one file per family."""

"""Train the shipped generator further, fast enough for a GPU: ``python -m ldo.sandbox.build.further``.

Only the transformer learns. The text encoder stays as shipped: captions are then embedded once, and the step is only
matrices. Latents and embeddings lie on the device (``clips``). On a GPU the blocks are compiled, and the step with its
optimizer and its average is one CUDA graph (``step``), since launches would cost more than arithmetic at this size.
Training goes in slices of a given time (``slices``) that resume from each other (``checkpoint``).
"""

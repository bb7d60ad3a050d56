"""Training of the sandbox's tiny models, in the real formats: ``python -m ldo.sandbox.build``."""

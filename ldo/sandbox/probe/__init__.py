"""What a linear probe reads from features: ``python -m ldo.sandbox.probe``."""

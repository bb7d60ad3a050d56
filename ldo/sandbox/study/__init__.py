"""The seven-arm study: ``python -m ldo.sandbox.study``."""

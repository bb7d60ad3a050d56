"""How good a sandbox generator is: ``python -m ldo.sandbox.build.quality``."""

"""LDO: post-train video diffusion models with a frozen predictive world model as teacher and critic."""

__version__ = "0.1.0"

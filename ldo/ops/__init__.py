"""The operations of LDO, each one function with an ``impl`` argument; the reference forms are the specification."""

from ldo.ops.advantage import GroupStats, group_advantage
from ldo.ops.relation import relation_loss
from ldo.ops.residual import predictive_residual
from ldo.ops.surrogate import Surrogate, grpo_surrogate

__all__ = ["GroupStats", "Surrogate", "group_advantage", "grpo_surrogate", "predictive_residual", "relation_loss"]

"""What the tests of the fused relation loss share: inputs on its device, its result and the exact one."""

import dataclasses

import torch

from ldo.kernels import relation_plan
from tests.helpers import relations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The largest relative error of a gradient in that precision.
GOAL = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}

# The interpreter's configuration with pointers in place of tensor descriptors.
POINTERS = dataclasses.replace(relation_plan.ON_CPU, use_tma=False, slices=1)


def inputs(*shape, dtype=torch.float32, options=True, **keywords):
    """``relations.inputs`` of shape B, N, D, E on the device; without ``options`` there are no keywords."""
    clips, tokens, width, teacher_width = shape
    student, teacher, named = relations.inputs(
        clips, tokens, width=width, teacher_width=teacher_width, dtype=dtype, **keywords
    )
    named = {name: value.to(DEVICE) for name, value in named.items()} if options else {}
    return student.to(DEVICE), teacher.to(DEVICE), named


def truth(student, teacher, upstream=1.0, **options):
    """Loss and gradient of the reference in fp64."""
    return relations.loss_and_gradient(student.double(), teacher.double(), upstream, impl="reference", **options)


def fused(student, teacher, upstream=1.0, **options):
    """Loss and gradient of the kernels."""
    return relations.loss_and_gradient(student, teacher, upstream, impl="triton", **options)

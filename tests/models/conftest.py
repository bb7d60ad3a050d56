"""Fixtures of the models' tests."""

import pytest
import torch
from diffusers.models import attention_dispatch

from ldo.models import attention, attention_backends
from ldo.models.generator.families import load_generator
from ldo.models.generator.folder import read_geometry
from ldo.models.generator.protocol import Options
from tests.helpers import models
from tests.helpers.plain_attention import attend_plainly


@pytest.fixture(scope="session", params=models.FAMILIES)
def folder(request, tmp_path_factory):
    """A pipeline folder of each family, and the family's forms."""
    return models.FAMILIES[request.param](tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture
def model(folder):
    """A fresh adapter around the pipeline in ``folder``: tests change it."""
    family, _ = read_geometry(folder)
    return load_generator(family, folder, options=Options(text_length=16, guidance=3.0))


@pytest.fixture
def pretend(monkeypatch):
    """Every package is installed and every machine will do; flash-attn and xformers are PyTorch arithmetic.

    Returns the list of their calls.
    """
    calls = []

    # parameters have the packages' names: diffusers passes them by keyword
    def dense(q, k, v, softmax_scale=None, **_):
        calls.append("flash")
        return attend_plainly(q, k, v, scale=softmax_scale)

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **_):
        """Sequences of different lengths one after the other: [sum N, H, D]."""
        calls.append("flash_varlen")
        query_ends, key_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        outputs = []
        for number in range(len(query_ends) - 1):
            queries = slice(query_ends[number], query_ends[number + 1])
            keys = slice(key_ends[number], key_ends[number + 1])
            attended = attend_plainly(q[None, queries], k[None, keys], v[None, keys], scale=softmax_scale)
            outputs.append(attended[0])
        return torch.cat(outputs)

    class Ops:
        @staticmethod
        def memory_efficient_attention(query, key, value, bias=None, p=0.0, scale=None):
            calls.append("xformers")
            return attend_plainly(query, key, value, bias, scale)

    for name, value in {"flash_attn_func": dense, "flash_attn_varlen_func": packed, "xops": Ops}.items():
        monkeypatch.setattr(attention_dispatch, name, value)
    # diffusers looks at these before it calls a package
    for name in ("_CAN_USE_FLASH_ATTN", "_CAN_USE_XFORMERS_ATTN"):
        monkeypatch.setattr(attention_dispatch, name, True)
    for module in (attention, attention_backends):
        monkeypatch.setattr(module, "refusal", lambda *_: None)
    return calls

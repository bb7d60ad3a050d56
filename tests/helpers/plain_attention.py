"""Attention as PyTorch computes it, in the layout of diffusers' backends."""

import torch.nn.functional as F


def attend_plainly(query, key, value, mask=None, scale=None):
    """Attention of tensors [B, N, H, D]."""
    heads_first = [states.transpose(1, 2) for states in (query, key, value)]
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)

"""The order of a clip's tokens by frame, by which the relation loss adds up weights. It is cached for each tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class FrameOrder(NamedTuple):
    """Tokens by frame, for the sums of W, and the frames themselves; all int32, on the tokens' device."""

    order: Tensor  # [N] tokens sorted by frame
    run_start: Tensor  # [N + 1] for each place in that order, where its frame begins; N at the end
    frame: Tensor  # [padded] frames in the tokens' own order, 0 past N


# By tensor: its version and the padding for which the order was made, and the order.
_frame_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def frame_order(frame_N: Tensor, padded: int) -> FrameOrder:
    """The order of ``frame_N``'s tokens, with the frames padded to ``padded`` places. Nothing here waits for the GPU.

    The order is cached for as long as this very tensor lives and is not written to, so pass the same tensor at every
    call.
    """
    # Not cached: inference tensors, which have no version that would show a write, and tensors in the memory of a CUDA
    # graph, which a replay may overwrite.
    cacheable = not (frame_N.is_inference() or (frame_N.is_cuda and torch.cuda.is_current_stream_capturing()))
    known = _frame_orders.get(frame_N)
    if known is not None:
        made_for, order = known
        if made_for == (frame_N._version, padded):
            return order
    made = _sorted_by_frame(frame_N, padded)
    if cacheable:
        _frame_orders[frame_N] = (frame_N._version, padded), made
    return made


def _sorted_by_frame(frame_N: Tensor, padded: int) -> FrameOrder:
    frame = frame_N.int()
    tokens = len(frame)
    ordered, order = frame.sort(stable=True)
    places = torch.arange(tokens, dtype=torch.int32, device=frame.device)
    # Where a frame begins its own place, elsewhere 0: the running maximum is then the start of the current frame.
    starts = torch.where(ordered[1:] != ordered[:-1], places[1:], 0)
    run_start = torch.full((tokens + 1,), tokens, dtype=torch.int32, device=frame.device)
    run_start[0] = 0
    run_start[1:tokens] = starts.cummax(0).values
    return FrameOrder(order.int(), run_start, F.pad(frame, (0, padded - tokens)))

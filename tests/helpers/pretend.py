"""A GPU that is only pretended: tensors "on cuda" are CPU memory with a mark, and what a real GPU refuses is refused.

Within ``gpu()`` the process believes in one GPU. Moving a tensor there copies and marks it; an operation on a marked
and an unmarked tensor raises as CUDA would, as do reading a marked one through NumPy and drawing one with a CPU
generator. So code that has only ever run on a CPU shows its device mistakes. Kernels, precision and speed are a CPU's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ldo.ops import extension, native

_REAL = torch.Generator
HOST, CARD = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
# One of their tensors may be elsewhere.
MIXED = {aten.copy_, aten.index_put_, aten.index_put, aten._index_put_impl_, aten.index}
CUDA_ONLY = {  # fp32 products of half-precision operands
    aten.bmm.dtype: lambda left, right, dtype: left.to(dtype) @ right.to(dtype),
    aten.baddbmm.dtype_out: lambda addend, left, right, dtype, beta=1, out=None: torch.baddbmm(
        addend, left.to(dtype), right.to(dtype), beta=beta, out=out
    ),
}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
SPEAK = {torch.device, torch._C._nn._parse_to}  # name a device and touch no tensor
BACKWARD = {Tensor.backward, torch.autograd.grad}
READS = {Tensor.numpy, Tensor.__array__}


class Marks:
    """Which storages are on the card.

    A weak reference keeps an address from being used again while it is looked up here.
    """

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}
        # Whether the function being called was given something on the card: then what it makes from nothing is there.
        self.ambient = False

    def on_card(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            found = self._known.get(tensor.untyped_storage()._cdata) if _backed(tensor) else None
        return found is not None and not found.expired()

    def moved(self, tensor: Tensor, there: bool) -> Tensor:
        """A copy of ``x`` on the card (``there``) or on the host."""
        copy = tensor.clone()
        if there:
            self.put(copy)
        else:
            with torch._C.DisableTorchFunction():
                self._known.pop(copy.untyped_storage()._cdata, None)
        return copy

    def put(self, *tensors: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                if _backed(tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self._known or self._known[storage._cdata].expired():
                        self._known[storage._cdata] = StorageWeakRef(storage)
            # now and then, so that a long run does not collect entries of tensors long gone
            if len(self._known) > 20_000:
                self._known = {
                    address: reference for address, reference in self._known.items() if not reference.expired()
                }


def _backed(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout == torch.strided


def _is_card(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.split(":")[0] == "cuda"
    )


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = tuple(values.values())
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, tuple | list) else []


# Two modes are needed: operations within the backward pass are seen only below autograd, moves and the devices that
# arguments name only above it.


class _Operations(TorchDispatchMode):
    """Below autograd: every operation's tensors are in one place, and so are its results."""

    def __init__(self, marks: Marks, above: TorchFunctionMode):
        super().__init__()
        self.marks, self.above = marks, above

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operator = OPDEFS.get(f"{func.namespace}::{func._opname}")
        # an operation written in Python: its body is watched, and shows by itself what it takes from where
        if operator is not None:
            with self, self.above:
                return (operator._backend_fns.get("cuda") or operator._backend_fns[None])(*args, **kwargs)
        given = _tensors((args, kwargs))
        on_card = [self.marks.on_card(tensor) for tensor in given]
        packet = func.overloadpacket
        if packet not in MIXED:
            with torch._C.DisableTorchFunction():
                places = {
                    card
                    for tensor, card in zip(given, on_card, strict=True)
                    if (tensor.ndim or card) and tensor.device.type == "cpu"
                }
            if len(places) > 1:
                where = ", ".join(
                    f"{list(tensor.shape)} {CARD if marked else HOST}"
                    for tensor, marked in zip(given, on_card, strict=True)
                )
                raise RuntimeError(f"{func}: tensors on different devices: {where}")
            card = places == {True} or (not given and self.marks.ambient)
        else:
            card = on_card[0]
            if packet is not aten.copy_ and not card and any(on_card[1:]):
                raise RuntimeError(
                    f"{func}: tensors on different devices, indices or values on {CARD}, the tensor on {HOST}"
                )
        result = (CUDA_ONLY.get(func, func) if card else func)(*args, **kwargs)
        if card:
            self.marks.put(*_tensors(result))
        return result


class _Functions(TorchFunctionMode):
    """Above autograd: devices in arguments, moves, and the attributes that tell where a tensor is."""

    def __init__(self, marks: Marks):
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return CARD if self.marks.on_card(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return self.marks.on_card(args[0])
        if func == Tensor.is_cpu.__get__:
            return args[0].is_cpu and not self.marks.on_card(args[0])
        if func in READS and self.marks.on_card(args[0]):
            raise TypeError(
                f"can't convert {CARD} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                "memory first."
            )
        if func is Tensor.pin_memory:
            if self.marks.on_card(args[0]):
                raise RuntimeError("only dense CPU tensors can be pinned")
            if any(stride == 0 and size > 1 for size, stride in zip(args[0].shape, args[0].stride(), strict=True)):
                raise RuntimeError(
                    "unsupported operation: more than one element of the written-to tensor refers to a single memory "
                    "location"
                )
            return args[0].clone()
        if func in SPEAK:
            return func(*args, **kwargs)
        if func in MOVES:
            return self._move(func, args, kwargs)
        to_card = any(_is_card(value) for value in (*args, *kwargs.values()))
        to_host = not to_card and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        of_card = bool(args) and isinstance(args[0], Tensor) and self.marks.on_card(args[0])
        generator = kwargs.get("generator")
        if generator is not None and isinstance(generator, Generator) != (to_card or of_card):
            wanted, found = ("cuda", "cpu") if to_card or of_card else ("cpu", "cuda")
            raise RuntimeError(f"{func.__name__}: expected a '{wanted}' device type for generator but found '{found}'")
        if to_card:
            args, kwargs = tree_map(_host, (args, kwargs))
        elif to_host and of_card:  # zeros_like(x, device="cpu"): nothing of x's place
            args = (self.marks.moved(args[0].detach(), False), *args[1:])
        outer, self.marks.ambient = (
            self.marks.ambient,
            not to_host and any(map(self.marks.on_card, _tensors((args, kwargs)))),
        )
        try:
            if func in BACKWARD:  # Python code runs in there, and must be watched
                with (
                    self,
                    mock.patch("torch.autograd.has_torch_function", _no),
                    mock.patch("torch._tensor.has_torch_function_unary", _no),
                ):
                    return func(*args, **kwargs)
            result = func(*args, **kwargs)
        finally:
            self.marks.ambient = outer
        if to_card:
            if func in (torch.as_tensor, torch.asarray):  # of host memory: a move
                result = result.clone()
            self.marks.put(*_tensors(result))
        return result

    def _move(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        tensor, rest = args[0], list(args[1:])
        here = self.marks.on_card(tensor)
        if func is Tensor.cpu or func is Tensor.cuda:
            there, rest, kwargs = func is Tensor.cuda, [], {}
        else:
            named = [value for value in (*rest, *kwargs.values()) if isinstance(value, torch.device | str)]
            other = [value for value in rest if isinstance(value, Tensor)]
            there = _is_card(named[0]) if named else self.marks.on_card(other[0]) if other else here
            if named and not there and torch.device(named[0]).type != "cpu":
                return func(*args, **kwargs)  # to meta
            rest = [_host(value) for value in rest]
            kwargs = {name: _host(value) for name, value in kwargs.items()}
        tensor = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        return tensor if here == there else _Move.apply(tensor, there, self.marks)


class _Move(torch.autograd.Function):
    """A copy to the other place; its gradient comes back."""

    @staticmethod
    def forward(ctx, tensor, there, marks):
        ctx.there, ctx.marks = there, marks
        return marks.moved(tensor, there)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.marks.moved(upstream, not ctx.there), None, None


def _no(*_: Any) -> bool:
    return False


def _host(value: Any) -> Any:
    return HOST if _is_card(value) else value


class Generator(_REAL):
    """Stands for torch.Generator: one of the card is of this class, one of the CPU is torch's own."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu") if _is_card(device) else _REAL(device)

    @property
    def device(self) -> torch.device:
        return CARD


class _Event:
    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return 1e3 * max(other.at - self.at, 1e-7)

    def synchronize(self) -> None:
        pass


def as_gpu(module: Any) -> SimpleNamespace:
    """The extension as if built with CUDA: a launch calls the C++ form, without what only a GPU needs."""
    names = {name: getattr(module, name) for name in dir(module) if not name.startswith("__")}

    def launch(call: Any) -> Any:
        return lambda **given: call(
            **{name: value for name, value in given.items() if name not in ("workspace", "device", "stream", "wait")}
        )

    return SimpleNamespace(
        **names | {"CUDA": True} | {name: launch(names[name]) for name in ("group_advantage", "grpo_surrogate")}
    )


def _extension(found: tuple[Any, str]) -> Any:
    module, reason = found
    return lambda: (module and as_gpu(module), reason)


@contextmanager
def gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[Marks]:
    """Within the context there is one GPU, of pretended memory."""
    marks = Marks()
    if alignment := sys.modules.get("ldo.method.alignment"):
        for kept in (alignment.area_weights, alignment.time_weights, alignment.frame_of_tokens):
            kept.cache_clear()  # what an earlier pretence left there has lost its marks
    nothing = lambda *_, **__: None  # noqa: E731
    properties = SimpleNamespace(
        name="Pretended GPU",
        total_memory=80 * 2**30,
        L2_cache_size=50 * 2**20,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
    )
    said = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_: True,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda *_: [torch.get_rng_state()],
        "is_current_stream_capturing": lambda: False,
        "is_initialized": lambda: True,
        "Event": _Event,
        "current_stream": lambda *_: SimpleNamespace(cuda_stream=0, synchronize=nothing, wait_stream=nothing),
    }
    silent = (
        "set_device synchronize empty_cache reset_peak_memory_stats init _lazy_init "
        "manual_seed manual_seed_all set_rng_state set_rng_state_all"
    )
    with ExitStack() as stack:
        for name, value in {**said, **{name: nothing for name in silent.split()}}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch("torch.Generator", Generator))
        # saved within an operation, compared outside: where the mark is seen in one place only
        shapes = {"default": lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}}
        stack.enter_context(mock.patch.dict("torch.utils.checkpoint._allowed_determinism_checks_to_fns", shapes))
        stack.enter_context(mock.patch.object(extension, "load", _extension(extension.load())))
        stack.enter_context(mock.patch.object(native, "_stream", lambda _: 0))
        functions = _Functions(marks)
        stack.enter_context(_Operations(marks, functions))
        stack.enter_context(functions)
        yield marks

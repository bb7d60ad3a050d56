"""The Triton residual against the reference: by its own error against fp64, bit for bit, in odd shapes, and ahead of time.

Without a GPU Triton interprets the kernels, which shows what they compute; what a compiler makes of them is at the end.
"""

import mmap
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import aot
import regions

from ldo.kernels import residual, residual_rows
from ldo.ops import predictive_residual
from ldo.ops.residual import METRICS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMALISATIONS = [(True, True), (True, False), (False, True), (False, False)]


def inputs(rows, features, dtype=torch.float32, seed=0):
    """Predicted and target [M, D], weights [M]."""
    g = torch.Generator().manual_seed(seed)
    z, h = (torch.randn(rows, features, generator=g) * 2 + 0.5 for _ in range(2))
    return z.to(DEVICE, dtype), h.to(DEVICE, dtype), (torch.rand(rows, generator=g) + 0.1).to(DEVICE)


def solve(impl, z, h, dtype=None, scale=1.0, **options):
    """Means and gradient, for an upstream that differs between segments."""
    z, h = (x.detach() if dtype is None else x.detach().to(dtype) for x in (z, h))
    z.requires_grad_()
    out = predictive_residual(z, h, impl=impl, **options)
    (gradient,) = torch.autograd.grad(out, z, scale * torch.linspace(0.5, 1.5, len(out), dtype=out.dtype, device=out.device))
    return out.detach(), gradient


def assert_no_worse(z, h, factor=1.1, **options):
    """The kernel's largest error is the reference's in the same dtype, give or take eight fp32 roundings of the largest number."""
    truth = solve("reference", z, h, torch.float64, **options)
    theirs, ours = solve("reference", z, h, **options), solve("triton", z, h, **options)
    for name, x, reference, exact in zip(("value", "gradient"), ours, theirs, truth, strict=True):
        assert x.dtype == reference.dtype and x.shape == reference.shape
        scale = exact.abs().max().item()
        if name == "value" and options.get("metric", "cosine") == "cosine":
            scale = max(scale, 1)  # it is 1 minus a number that was rounded
        error, allowed = ((v.double() - exact).abs().max().item() for v in (x, reference))
        assert error <= factor * allowed + 2**-21 * scale, f"{name}: {error:.2e}, reference {allowed:.2e}, largest {scale:.2e}; {options}"


def cuts(rows):
    """One segment, one a row, and ragged ones."""
    return [None, torch.arange(rows + 1), torch.tensor(sorted({0, 1, rows // 3, rows // 2, rows}))]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalised", NORMALISATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_the_references(metric, normalised, dtype):
    z, h, weight = inputs(37, 97, dtype)
    for segments in cuts(37):
        for w in (None, weight):
            predicted, target = normalised
            assert_no_worse(z, h, segments=segments, weight_M=w, metric=metric, normalize_predicted=predicted, normalize_target=target)


@pytest.mark.parametrize("features", [1, 7, 97, 130, 1024, 1408])
@pytest.mark.parametrize("rows", [1, 5, 37, 130])
def test_odd_shapes(rows, features):
    for metric, dtype in zip(METRICS, DTYPES, strict=True):
        z, h, weight = inputs(rows, features, dtype)
        assert_no_worse(z, h, segments=cuts(rows)[2], weight_M=weight, metric=metric)


@pytest.mark.parametrize("segments", [None, [0, 9000], [0, 1, 8700, 9000]])
def test_long_segments_are_summed_in_slices(segments, monkeypatch):
    assert residual.SLICE < 8699
    monkeypatch.setattr(residual_rows, "tile", lambda features, alone: (2048, 16, 4))  # few steps for the interpreter
    z, h, weight = inputs(9000, 3)
    segments = None if segments is None else torch.tensor(segments)
    for w in (None, weight):
        assert_no_worse(z, h, segments=segments, weight_M=w, metric="l2", normalize_target=False)


@pytest.mark.parametrize("rows", [16, 17, 130])
def test_every_way_to_slice(rows, monkeypatch):
    """Slices, segments and tiles whose borders fall together, or one apart."""
    monkeypatch.setattr(residual, "SLICE", 16)
    z, h, weight = inputs(rows, 5)
    options = {"metric": "l1", "normalize_target": False}
    for segments in (None, [0, rows], [0, 15, rows], [0, 1, 2, rows], [*range(0, rows - 1, 2), rows], [0, *range(rows - 9, rows + 1)]):
        for w in (None, weight):
            assert_no_worse(z, h, segments=None if segments is None else torch.tensor(segments), weight_M=w, **options)


@pytest.mark.parametrize("metric", METRICS)
def test_nearly_perfect_forecast(metric):
    """Where a and b cancel, what is left of them is about as accurate as in the reference.

    About: autograd of the layer norm wipes out rounding along z, which changes nothing but the length of z.
    """
    h, noise, _ = inputs(37, 384)
    options = {"metric": metric, "normalize_predicted": metric == "cosine", "normalize_target": metric == "cosine"}
    for size in (1e-1, 1e-3):
        assert_no_worse(h + size * noise, h, factor=2.5, segments=torch.arange(38), **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalised", NORMALISATIONS)
def test_zero_rows(metric, normalised):
    for dtype in DTYPES:
        z, h, _ = inputs(6, 33, dtype)
        z[[0, 2]] = 0
        h[[1, 2]] = 0
        options = {"metric": metric, "normalize_predicted": normalised[0], "normalize_target": normalised[1], "segments": torch.arange(7)}
        assert_no_worse(z, h, **options)
        if metric == "cosine":
            out, gradient = solve("triton", z, h, **options)
            assert (out[:3] == 1).all() and (gradient[:3] == 0).all() and (gradient[3:] != 0).any(1).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("normalised", NORMALISATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_far_as_in_the_reference(metric, normalised, bad):
    z, h, weight = inputs(9, 33)
    z[1, 4] = bad
    h[3, 7] = bad
    weight[6] = float("nan")
    for segments in (torch.tensor([0, 2, 4, 6, 9]), torch.arange(10)):
        weight[3] = len(segments) == 10  # in a segment of several rows weight 0 does not hide it
        options = {"metric": metric, "normalize_predicted": normalised[0], "normalize_target": normalised[1]}
        options |= {"segments": segments, "weight_M": weight}
        for ours, theirs in zip(solve("triton", z, h, **options), solve("reference", z, h, **options), strict=True):
            if bad != bad:
                assert torch.equal(ours.isnan(), theirs.isnan()) and theirs.isnan().any()
            assert torch.equal(ours.isfinite(), theirs.isfinite()) and not theirs.isfinite().all()
            torch.testing.assert_close(ours[theirs.isfinite()], theirs[theirs.isfinite()])


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_is_read_that_was_not_written(metric, monkeypatch):
    z, h, weight = inputs(37, 97)
    empty = torch.empty
    monkeypatch.setattr(residual, "SLICE", 16)
    for segments in [*cuts(37), torch.tensor([0, 37])]:
        options = {"segments": segments, "weight_M": weight, "metric": metric}
        clean = solve("triton", z, h, **options)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan") if k["dtype"].is_floating_point else -1))
            poisoned = solve("triton", z, h, **options)
        assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("metric", METRICS)
def test_repeats_bit_for_bit(metric):
    z, h, weight = inputs(300, 40, torch.bfloat16)
    options = {"metric": metric, "weight_M": weight, "segments": torch.tensor([0, 3, 290, 300])}
    first, second = solve("triton", z, h, **options), solve("triton", z, h, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_the_inputs_does_not_matter(dtype):
    z, h, weight = inputs(37, 40, dtype)
    options = {"segments": torch.tensor([0, 5, 37])}
    expected = solve("triton", z, h, weight_M=weight, **options)
    wide = torch.full((37 * 2, 51), float("nan"), dtype=dtype, device=DEVICE)
    wide[::2, 3:43] = z
    spread = torch.zeros(37, 3, device=DEVICE)
    spread[:, 1] = weight
    for a, b in ((wide[::2, 3:43], h), (z.T.contiguous().T, h), (z, h.T.contiguous().T)):
        result = solve("triton", a, b, weight_M=spread[:, 1], **options)
        assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
    same = h[:1].expand(37, 40)
    assert all(torch.equal(x, y) for x, y in zip(solve("triton", z, same), solve("triton", z, same.clone()), strict=True))


def test_layout_of_the_upstream_does_not_matter():
    z, h, _ = inputs(12, 20)
    z.requires_grad_()
    out = predictive_residual(z, h, segments=torch.tensor([0, 2, 7, 12]), impl="triton")
    upstream = torch.tensor([[1.0, 9], [2, 9], [3, 9]], device=DEVICE)
    for odd in (upstream[:, 0], torch.tensor(0.5, device=DEVICE).expand(3)):
        (one,), (two,) = (torch.autograd.grad(out, z, u, retain_graph=True) for u in (odd, odd.clone()))
        assert torch.equal(one, two) and one.any()


@pytest.mark.parametrize("inside", regions.AUTOCAST, ids="+".join)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_no_bit(metric, dtype, inside):
    z, h, weight = inputs(12, 20, dtype)
    options = {"segments": torch.tensor([0, 2, 7, 12]), "metric": metric, "weight_M": weight}
    regions.assert_same(lambda x: predictive_residual(x, h, impl="triton", **options), z, inside)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float64, torch.bfloat16])
def test_weights_may_be_of_any_type(dtype):
    z, h, _ = inputs(12, 20)
    weight = torch.tensor([1.0, 0, 1, 1] * 3, device=DEVICE)
    result = solve("triton", z, h, weight_M=weight.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(result, solve("triton", z, h, weight_M=weight), strict=True))


def test_fp16_loss_scale_acts_before_rounding():
    z, h, _ = inputs(37, 97, torch.float16)
    z, scale = z * 2000, 2.0**14
    options = {"segments": torch.tensor([0, 5, 37]), "normalize_predicted": False}
    assert_no_worse(z, h, scale=scale, **options)
    truth = solve("reference", z, h, torch.float64, **options)[1]
    scaled, plain = (solve("triton", z, h, scale=s, **options)[1].double() / s for s in (scale, 1.0))
    assert (plain - truth).abs().max() > 10 * (scaled - truth).abs().max()  # unscaled, these gradients are too small for fp16


@pytest.mark.parametrize("normalised", NORMALISATIONS)
def test_l1_has_no_slope_where_nothing_differs(normalised):
    z, _, _ = inputs(9, 130)
    same = normalised[0] == normalised[1]
    out, gradient = solve("triton", z, z.clone(), metric="l1", normalize_predicted=normalised[0], normalize_target=normalised[1])
    assert (out == 0).all() == same and (gradient == 0).all() == same


def test_sums_taken_together_are_those_taken_apart(monkeypatch):
    """On a GPU a row's sums are exchanged between warps together; the interpreter otherwise takes them one by one."""
    for metric in METRICS:
        z, h, _ = inputs(5, 33)
        for predicted, target in NORMALISATIONS:
            options = {"metric": metric, "normalize_predicted": predicted, "normalize_target": target}
            with monkeypatch.context() as patch:
                patch.setattr(residual_rows, "INTERPRET", False)
                together = solve("triton", z, h, **options)
            for a, b in zip(together, solve("triton", z, h, **options), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"segments": torch.tensor([0, 2, 2, 6])}, r"must rise strictly from 0 to 6, got \[0, 2, 2, 6\]"),
        ({"segments": torch.tensor([0, 7])}, "must rise strictly from 0 to 6"),
        ({"segments": torch.tensor([0.0, 6])}, "two integer offsets"),
        ({"segments": torch.tensor([0, 2, 6]), "weight_M": torch.tensor([1.0, 1, 0, 0, 0, 0])}, "segment 1 has no weight"),
        ({"segments": torch.arange(7), "weight_M": torch.tensor([1.0, 1, 1, 0, 1, 1])}, "segment 3 has no weight"),
        ({"weight_M": torch.zeros(6)}, "segment 0 has no weight"),
    ],
)
def test_bad_input_is_named(change, message):
    change = {k: v.to(DEVICE) for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        predictive_residual(torch.ones(6, 3, device=DEVICE), torch.ones(6, 3, device=DEVICE), impl="triton", **change)


def test_what_triton_does_not_take():
    z = torch.ones(2, 3, device=DEVICE, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton' is not available.*Triton kernels take fp32, bf16, fp16, not float64"):
        predictive_residual(z, z, impl="triton")
    wide = torch.ones(1, residual_rows.WIDEST + 1, device=DEVICE)
    with pytest.raises(ValueError, match="rows of more than 16384 features"):
        predictive_residual(wide, wide, impl="triton")
    assert predictive_residual(wide, wide, metric="l1", normalize_target=False).item() == 0  # auto: the reference


def test_auto_takes_triton_on_a_gpu_alone(monkeypatch):
    calls = []
    forward = residual.forward
    monkeypatch.setattr(residual, "forward", lambda *a: calls.append(a) or forward(*a))
    z, h, _ = inputs(4, 5)
    predictive_residual(z, h)
    assert len(calls) == (DEVICE == "cuda")
    predictive_residual(z.cpu(), h.cpu())
    assert len(calls) == (DEVICE == "cuda")
    predictive_residual(z, h, impl="triton")
    assert len(calls) == 1 + (DEVICE == "cuda")


# ------------------------------------------------------------------------------------------ as PyTorch operators


@pytest.mark.parametrize("segments", [None, [0, 5, 12], range(13)])
def test_opcheck(segments):
    z, h, weight = inputs(12, 33, torch.float16)
    segments = None if segments is None else torch.tensor(segments)
    for metric, w in zip(METRICS, (None, weight, weight), strict=True):
        torch.library.opcheck(residual.forward, (z.clone().requires_grad_(), h, segments, w, metric, True, True, True))
        torch.library.opcheck(residual.forward, (z, h, segments, w, metric, False, True, False))
        _, statistics, total, offsets = residual.forward(z, h, segments, w, metric, True, True, True)
        torch.library.opcheck(residual.backward, (torch.ones_like(total), z, h, w, statistics, total, offsets, metric, True))


@pytest.mark.parametrize("segments", [None, [0, 5, 12], range(13)])
def test_compiles_in_one_graph(segments):
    def loss(z, h, segments, weight):
        return predictive_residual(z, h, segments=segments, weight_M=weight, impl="triton").square().sum()

    z, h, weight = inputs(12, 33)
    segments = None if segments is None else torch.tensor(segments)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(z, h, segments, weight), z) for f in (loss, compiled) if z.requires_grad_() is z]
    assert torch.equal(gradients[0][0], gradients[1][0]) and gradients[0][0].any()
    if segments is not None:
        with pytest.raises(ValueError, match="must rise strictly"):
            compiled(z, h, segments.flip(0), weight)


# -------------------------------------------------------------------------------------------------- large offsets


def sparse(elements, dtype):
    """A tensor of zeros whose memory is there only where something is written."""
    size = elements * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)), dtype=dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="the real thing is tested instead")
def test_offsets_pass_2_to_the_31():
    """Rows 2^30 elements apart: the third is where 32-bit offsets wrap around, into the half of the memory before the first."""
    rows, features, stride = 3, 24, 2**30
    far = [sparse(2**31 + 2 * stride + features, torch.float16)[2**31 :].as_strided((rows, features), (stride, 1)) for _ in range(3)]
    z, h, _ = inputs(rows, features, torch.float16)
    far[0].copy_(z), far[1].copy_(h)
    expected = solve("triton", z, h)
    assert all(torch.equal(a, b) for a, b in zip(solve("triton", far[0], far[1]), expected, strict=True))
    _, statistics, total, offsets = residual.forward(z, h, None, None, "cosine", True, True, True)
    near = torch.zeros(rows, features)
    for z_, h_, gradient in ((z, h, near), (far[0], far[1], far[2])):
        residual_rows.launch_gradients(torch.ones(1), z_, h_, None, statistics, total, offsets, gradient, "cosine", True)
    assert torch.equal(far[2], near.half()) and near.any()


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows, features = 2**21 + 5, 1024
    z, h = (torch.zeros(rows, features, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    near_z, near_h, _ = inputs(5, features, torch.bfloat16)
    z[-5:], h[-5:] = near_z, near_h
    z.requires_grad_()
    near_z.requires_grad_()
    out = predictive_residual(z, h, segments=torch.tensor([0, rows - 5, rows]), impl="triton")
    near = predictive_residual(near_z, near_h, impl="triton")
    out[1].backward(), near.sum().backward()
    assert out[0] == 1 and torch.equal(out[1:], near)
    assert torch.equal(z.grad[-5:], near_z.grad) and near_z.grad.any() and not z.grad[:-5].any()


# ------------------------------------------------------------------------------------------------- ahead of time

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def row_specs(features, dtype, metric):
    """The row kernels as ``launch_rows``, with and without statistics, and ``launch_gradients`` launch them on contiguous inputs."""
    constants = {"predicted_stride": features, "target_stride": features, "D": features, "METRIC": metric, "NORM_Z": True}
    constants |= {"K": residual_rows.K[metric]}
    forward = constants | {"NORM_H": True, "FUSE_SUMS": True}
    rows = {"predicted": TYPES[dtype], "target": TYPES[dtype], "residual": "*fp32", "M": "i32"}
    keep = rows | {"statistics": "*fp32"}
    fp32 = dict.fromkeys(("upstream", "weight", "statistics", "total"), "*fp32")
    gradients = {"predicted": TYPES[dtype], "target": TYPES[dtype], "gradient": TYPES[dtype], "offsets": "*i64"}
    gradients |= fp32 | dict.fromkeys(("M", "S", "steps"), "i32")
    for name, kernel, signature, fixed in (
        ("forward", "row_residuals", rows, forward | {"statistics": None}),
        ("forward for backward", "row_residuals", keep, forward),
        ("backward", "row_gradients", gradients, constants | {"gradient_stride": features, "EACH": False}),
    ):
        pointers = tuple(p for p, t in signature.items() if t[0] == "*")
        title = f"{name} {metric} {features} {TYPES[dtype][1:]}"
        block_m, block_d, warps = residual_rows.tile(features, name == "forward", interpreted=False)
        fixed |= {"BLOCK_M": block_m, "BLOCK_D": block_d}
        yield aot.Spec(title, f"ldo.kernels.residual_rows:{kernel}", signature, fixed, pointers, warps, options=residual_rows.OPTIONS)


def segment_specs():
    for segments, count, weight, table in ((1, 10**6, None, None), (16, 16 * 2000, "*fp32", "*i64"), (10**6, 3 * 10**6, "*fp32", "*i64")):
        signature = {"value": "*fp32", "weight": weight, "offsets": table, "out": "*fp32", "total": "*fp32"}
        none = {k: None for k, t in signature.items() if t is None}
        signature = {k: t for k, t in signature.items() if t}
        block_s, block_r = residual.segment_tile(segments, count)
        constants = {"ROWS": True, "MEAN": True, "BLOCK_S": block_s, "BLOCK_R": block_r, **none}
        integers = dict.fromkeys(("S", "width", "count"), "i32")
        name, kernel = f"segment_means of {segments}", "ldo.kernels.residual:segment_means"
        yield aot.Spec(name, kernel, signature | integers, constants, tuple(signature), options=residual_rows.OPTIONS)


@pytest.fixture(scope="module")
def compiled():
    *other_segments, segments = segment_specs()
    others = [
        *row_specs(97, torch.bfloat16, "cosine"),
        *row_specs(1024, torch.bfloat16, "cosine"),
        *row_specs(8192, torch.float16, "l1"),
        *other_segments,
    ]
    return aot.compile_all([*row_specs(1408, torch.bfloat16, "cosine"), segments, *(replace(spec, archs=(90,)) for spec in others)])


def test_every_kernel_fits_every_architecture(compiled):
    assert {arch for _, arch in compiled} == {80, 90, 100} and len(compiled) == 3 * 4 + 11
    for name, usage in compiled.items():
        assert usage.stack == 0 and usage.spills == 0 and usage.shared <= aot.SHARED_LIMIT and usage.registers <= 128, f"{name}: {usage}"


def test_rows_move_in_16_bytes(compiled):
    wide = {name: usage for name, usage in compiled.items() if "1408" in name[0]}
    assert len(wide) == 9
    for name, usage in wide.items():
        assert usage.registers <= 64, f"{name}: {usage.registers} registers leave too few warps to hide memory"
        assert usage.count("LDG.E.128") == 6, name  # 24 elements a thread of two inputs, 2 bytes each; none past the row's end
        assert usage.count("STG.E.128") == 3 * name[0].startswith("backward"), name


def test_sums_of_usual_rows_stay_within_a_warp(compiled):
    """No barrier: a row that several warps share makes each wait for the others, a third of the time on an H200."""
    for name, usage in compiled.items():
        if "1024" in name[0] and "segment" not in name[0]:
            assert usage.count("BAR") == 0 and usage.registers <= 96, name

"""The product with a packed ternary G: through Triton's interpreter against fp64, and compiled ahead of time."""

import aot
import pytest
import torch

from benchmarks import packed_product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def inputs(m, k, n):
    g = torch.Generator().manual_seed(m + k)
    signs = torch.randint(-1, 2, (m, k), generator=g)
    return signs.to(DEVICE), torch.randn(k, n, generator=g).bfloat16().to(DEVICE)


def unpack(packed, bits, depth, columns):
    """Column c of G: where the layout says it lies."""
    at = torch.arange(columns)
    planes = 8 // bits
    place = at // (planes * depth) * depth + at % depth
    shift = (at // depth) % planes * 2 if bits == 2 else torch.full_like(at, 6)
    code = (packed.cpu().long()[:, place] >> shift) & 3
    return code * (2 - code)  # 0, 1, 3 -> 0, 1, -3


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("columns", [1, 16, 63, 64, 65, 200])
def test_layout(bits, columns):
    signs, _ = inputs(5, columns, 8)
    packed = packed_product.pack(signs, bits, 16)
    assert packed.dtype == torch.uint8 and packed.shape[1] % 16 == 0 and packed.shape[1] < columns * bits / 8 + 64
    assert torch.equal(unpack(packed, bits, 16, columns).sign(), signs.cpu())


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8), (32, 64, 32), (97, 130, 40), (33, 257, 72)], ids=str)  # M, K, N
def test_product(shape, bits, bulk):
    signs, x = inputs(*shape)
    if DEVICE.type == "cpu":
        cut = packed_product.Cut(32, 32, 16, 4, 1, bulk)
    else:
        major = torch.cuda.get_device_capability()[0]
        if bulk and major < 9:
            pytest.skip("no bulk copies before sm_90")
        cut = packed_product.CUTS[min(major * 10, 100) if bulk else 80]
    found = packed_product.product(packed_product.pack(signs, bits, cut.depth), x, bits, cut)
    exact = signs.double() @ x.double()
    assert found.dtype == torch.float32 and found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_ahead_of_time():
    specs = []
    for arch, c in packed_product.CUTS.items():
        for bits in (8, 2):
            x = f"tensordesc<bf16[{c.depth}, {c.cols}]>" if c.bulk else "*bf16"
            signature = {"packed": "*u8", "x": x, "out": "*fp32", **dict.fromkeys(("M", "N", "K", "stride"), "i32")}
            constants = {"ROWS": c.rows, "COLS": c.cols, "DEPTH": c.depth, "BITS": bits, "GROUP": packed_product.GROUP, "BULK": c.bulk}
            divisible = ("packed", "out", "N", "K", "stride", *(() if c.bulk else ("x",)))
            kernel = "benchmarks.packed_product:product_kernel"
            options = {"warps": c.warps, "stages": c.stages, "archs": (arch,)}
            specs.append(aot.Spec(f"{bits} bits sm_{arch}", kernel, signature, constants | {"INTERPRET": False}, divisible, **options))
    for (name, arch), found in aot.compile_all(specs).items():
        assert found.stack == 0 and found.spills == 0 and found.shared <= (101_376 if arch == 80 else aot.SHARED_LIMIT), name
        assert found.count(MATRIX[arch]) and not any(k.startswith(("I2F.U8", "I2F.U16", "I2FP")) for k in found.opcodes), name  # shifts alone widen

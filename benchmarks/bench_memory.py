"""The memory model of ldo.check against a device's allocator: training steps and sampling of published models, with few blocks.

    python benchmarks/bench_memory.py [--device cuda] [--out FILE.json]

Weights are random, shapes are real, so nothing is downloaded. Blocks beyond the third add the same each, which tests hold. On a
GPU the peak is that of the caching allocator; on a CPU sizes are tiny and the profiler measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare checkout needs no install

from benchmarks import common, memory
from ldo import lora, meta, passes
from ldo.generator import published
from ldo.passes import Step

GPU = [  # repository, blocks, latents (C, T, H, W), text tokens
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 3, (16, 13, 60, 104), 512),
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 3, (16, 13, 60, 104), 512),
    ("THUDM/CogVideoX-5b", 3, (16, 13, 60, 90), 226),
    ("hunyuanvideo-community/HunyuanVideo", 2, (16, 13, 60, 104), 256),
    ("Lightricks/LTX-Video", 3, (128, 16, 16, 24), 128),
]
CPU = [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 2, (16, 3, 16, 16), 16), ("Lightricks/LTX-Video", 2, (128, 3, 8, 8), 16)]


def measure(step: Step, device: torch.device, training: bool) -> int:
    """Bytes that one pass of the same model with random weights takes beyond its weights and gradients."""
    config = json.loads(step.config)
    model = meta.build(config, step.dtype).to_empty(device=device)
    parameters = []
    if training:
        parameters = list(lora.add({"transformer": model}, step.rank, step.rank, step.targets, 0).values())
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor.data, std=0.02)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    if step.checkpointing:
        model.enable_gradient_checkpointing()

    def call() -> torch.Tensor:
        arguments = meta.family(config).call(config, step.batch, step.latent, step.text, step.dtype)
        real = {k: _real(v, device) for k, v in arguments.items()}
        return model(**real, return_dict=False)[0].float()

    def work() -> None:
        if not training:
            with torch.no_grad():
                call()
            return
        noise, x0 = (torch.randn(step.batch, *step.latent, device=device) for _ in range(2))
        v = call()
        (v - (noise - x0).reshape(v.shape)).square().mean().backward()

    work()  # libraries make their workspaces on first use
    before = memory.baseline(device)
    return int(memory.peak_extra(work, device, before) * memory.MIB)


def _real(value, device: torch.device):
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return tuple(_real(v, device) for v in value)
    return torch.ones(value.shape, dtype=value.dtype, device=device) if isinstance(value, torch.Tensor) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="the first two models")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    rows = []
    print(f"{'model':38} {'pass':26} {'predicted MiB':>14} {'measured MiB':>13} {'ratio':>6}")
    for name, blocks, latent, text in (GPU if gpu else CPU)[: 2 if args.quick else None]:
        config = published.configs(name)["transformer"]
        family = meta.family(config)
        whole = json.dumps(config | dict.fromkeys(family.counts, blocks))
        dtype = torch.bfloat16 if gpu else torch.float32
        for kind, training, checkpointing in (("sampling", False, False), ("training", True, False), ("training, checkpointing", True, True)):
            step = Step(whole, dtype, 1, latent, text, 32 if training else 0, family.targets if training else (), checkpointing, device=device.type)
            predicted = passes.training_bytes(step) if training else passes.sampling_bytes(step)
            measured = measure(step, device, training)
            rows.append({"model": name, "pass": kind, "blocks": blocks, "latent": latent, "predicted": predicted, "measured": measured})
            figures = f"{predicted / memory.MIB:14.1f} {measured / memory.MIB:13.1f} {predicted / measured:6.3f}"
            print(f"{name:38} {kind:26} {figures}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**common.record(device), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

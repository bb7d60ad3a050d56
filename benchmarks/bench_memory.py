"""The memory model of ldo.check against a device's allocator: training steps and sampling of published models.

    python benchmarks/bench_memory.py [--device cuda] [--out FILE.json]

Weights are random and shapes are real, so nothing is downloaded. The models have few blocks: each beyond the third adds
the same, which a test asserts. On a GPU the peak is that of the caching allocator; on a CPU sizes are tiny and the
profiler measures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

# Before any import of the tree: a bare checkout then needs no install, and an installed ldo is not used instead.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import memory, provenance
from benchmarks.harness import write_json
from ldo.memory import passes
from ldo.memory.meta_models import build_meta, transformer_family
from ldo.memory.passes import TransformerPass
from ldo.models import lora
from ldo.models.generator.published import model_configs

# repository, blocks, latents (C, T, H, W), text tokens
GPU = [
    ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 3, (16, 13, 60, 104), 512),
    ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 3, (16, 13, 60, 104), 512),
    ("THUDM/CogVideoX-5b", 3, (16, 13, 60, 90), 226),
    ("hunyuanvideo-community/HunyuanVideo", 2, (16, 13, 60, 104), 256),
    ("Lightricks/LTX-Video", 3, (128, 16, 16, 24), 128),
]
CPU = [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 2, (16, 3, 16, 16), 16), ("Lightricks/LTX-Video", 2, (128, 3, 8, 8), 16)]


def measure(step: TransformerPass, device: torch.device, training: bool) -> int:
    """Bytes that one pass of the same model with random weights needs beyond its weights and gradients."""
    config = json.loads(step.config)
    model = build_meta(config, step.dtype).to_empty(device=device)
    parameters = []
    if training:
        parameters = list(lora.add({"transformer": model}, step.rank, step.rank, step.targets, 0).values())
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            torch.nn.init.normal_(tensor.data, std=0.02)
    for parameter in parameters:
        # before the measurement, which is of what a pass needs besides weights and gradients
        parameter.grad = torch.zeros_like(parameter)
    if step.checkpointing:
        model.enable_gradient_checkpointing()

    def call() -> torch.Tensor:
        arguments = transformer_family(config).call(config, step.batch, step.latent, step.text, step.dtype)
        real = {name: _real(argument, device) for name, argument in arguments.items()}
        return model(**real, return_dict=False)[0].float()

    def work() -> None:
        if not training:
            with torch.no_grad():
                call()
            return
        noise, clean = (torch.randn(step.batch, *step.latent, device=device) for _ in range(2))
        velocity = call()
        (velocity - (noise - clean).reshape(velocity.shape)).square().mean().backward()

    # libraries allocate their workspaces on first use
    work()
    before = memory.baseline(device)
    return int(memory.peak_extra(work, device, before) * memory.MIB)


def _real(value: Any, device: torch.device) -> Any:
    """The arguments of a meta model with values: ones in the place of tensors without any."""
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return tuple(_real(element, device) for element in value)
    if isinstance(value, torch.Tensor):
        return torch.ones(value.shape, dtype=value.dtype, device=device)
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="the first two models")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    gpu = device.type == "cuda"
    models = GPU if gpu else CPU
    if arguments.quick:
        models = models[:2]
    rows = []
    print(f"{'model':38} {'pass':26} {'predicted MiB':>14} {'measured MiB':>13} {'ratio':>6}")
    for repository, blocks, latent, text_tokens in models:
        config = model_configs(repository)["transformer"]
        family = transformer_family(config)
        # few blocks: large models fit, and the prediction is for the same few
        shortened = json.dumps(config | dict.fromkeys(family.counts, blocks))
        dtype = torch.bfloat16 if gpu else torch.float32
        for kind, training, checkpointing in (
            ("sampling", False, False),
            ("training", True, False),
            ("training, checkpointing", True, True),
        ):
            rank = 32 if training else 0
            targets = family.targets if training else ()
            step = TransformerPass(
                shortened, dtype, 1, latent, text_tokens, rank, targets, checkpointing, device=device.type
            )
            predicted = passes.training_bytes(step) if training else passes.sampling_bytes(step)
            measured = measure(step, device, training)
            rows.append(
                {
                    "model": repository,
                    "pass": kind,
                    "blocks": blocks,
                    "latent": latent,
                    "predicted": predicted,
                    "measured": measured,
                }
            )
            mebibytes = f"{predicted / memory.MIB:14.1f} {measured / memory.MIB:13.1f}"
            print(f"{repository:38} {kind:26} {mebibytes} {predicted / measured:6.3f}", flush=True)
    if arguments.out:
        write_json(arguments.out, {**provenance.record(device), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The shipped configurations are those of the published models.

Built on the meta device, they have their numbers of parameters.
"""

import json

import pytest
import torch

from ldo.core.errors import RecipeError
from ldo.memory.meta_models import add_meta_lora, build_meta, count_parameters, pipeline_geometry
from ldo.models.generator.folder import read_geometry
from ldo.models.generator.published import PUBLISHED, model_configs, published_names

# what the model cards and papers say, in billions, to the digits they give
PARAMETERS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"transformer": 1.42, "text_encoder": 5.68, "vae": 0.127},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"transformer": 14.29, "text_encoder": 5.68, "vae": 0.127},
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {"transformer": 5.00, "text_encoder": 5.68, "vae": 0.705},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {
        "transformer": 14.29,
        "transformer_2": 14.29,
        "text_encoder": 5.68,
        "vae": 0.127,
    },
    "THUDM/CogVideoX-2b": {"transformer": 1.69, "text_encoder": 4.76, "vae": 0.216},
    "THUDM/CogVideoX-5b": {"transformer": 5.57, "text_encoder": 4.76, "vae": 0.216},
    "hunyuanvideo-community/HunyuanVideo": {
        "transformer": 12.82,
        "text_encoder": 7.51,
        "text_encoder_2": 0.123,
        "vae": 0.246,
    },
    "Lightricks/LTX-Video": {"transformer": 1.92, "text_encoder": 4.76, "vae": 0.419},
    "Lightricks/LTX-Video-0.9.5": {"transformer": 1.92, "text_encoder": 4.76, "vae": 1.25},
    "facebook/vjepa2-vitl-fpc64-256": {"config": 0.326},
    "facebook/vjepa2-vith-fpc64-256": {"config": 0.654},
    "facebook/vjepa2-vitg-fpc64-256": {"config": 1.03},
    "facebook/vjepa2-vitg-fpc64-384": {"config": 1.03},
}
# VAE factors in time and space, the transformer's patch, latent channels
GEOMETRY = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (4, 8, (1, 2, 2), 16),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (4, 16, (1, 2, 2), 48),
    "THUDM/CogVideoX-2b": (4, 8, (1, 2, 2), 16),
    "hunyuanvideo-community/HunyuanVideo": (4, 8, (1, 2, 2), 16),
    "Lightricks/LTX-Video": (8, 32, (1, 1, 1), 128),
    "Lightricks/LTX-Video-0.9.5": (8, 32, (1, 1, 1), 128),
}


def test_every_shipped_configuration_is_held_to_a_published_count():
    assert set(PARAMETERS) == set(published_names())
    for name in published_names():
        content = (PUBLISHED / f"{name.replace('/', '--')}.json").read_text()
        # the library that reads it is named in it
        assert "diffusers" in content or "transformers" in content
        assert json.loads(content)["source"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    found = model_configs(name)
    index = found.get("model_index", {})
    for part, billions in PARAMETERS[name].items():
        class_name = index[part][1] if part in index else None
        # compared to as many digits as are published
        digits = len(str(billions).split(".")[1])
        count = count_parameters(build_meta(found[part], torch.bfloat16, class_name))
        assert round(count / 1e9, digits) == billions, (part, count)


def test_encoder_of_the_world_model():
    """ViT-L's encoder has the 0.3 billion that are published for it; the rest is the predictor."""
    model = build_meta(model_configs("facebook/vjepa2-vitl-fpc64-256")["config"], torch.float32)
    assert round(count_parameters(model.encoder) / 1e9, 2) == 0.30


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name):
    geometry = pipeline_geometry(model_configs(name))
    assert (geometry.time, geometry.space, geometry.patch, geometry.channels) == GEOMETRY[name]


def test_a_folder_gives_the_same_tree(wan_folder, vjepa_folder):
    found = model_configs(wan_folder)
    assert set(found) == {"model_index", "transformer", "vae", "text_encoder", "scheduler"}
    assert set(found) <= set(model_configs("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
    assert pipeline_geometry(found) == read_geometry(wan_folder)[1]
    assert model_configs(vjepa_folder)["config"]["model_type"] == "vjepa2"


def test_an_unknown_name_gives_none_and_a_renamed_one_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert model_configs("someone/else") is None
    assert model_configs("zai-org/CogVideoX-2b") == model_configs("THUDM/CogVideoX-2b")


def test_the_hub_cache_comes_before_what_is_shipped(monkeypatch, tmp_path):
    name = "facebook/vjepa2-vitl-fpc64-256"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "vjepa2", "hidden_size": 64}')
    assert model_configs(name)["config"]["hidden_size"] == 64


def test_a_broken_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        model_configs(tmp_path)


def test_what_stays_in_fp32_is_what_loading_leaves_there(wan, wan_folder):
    """The meta model has the precision that from_pretrained gives each weight."""
    from diffusers import WanTransformer3DModel

    loaded = WanTransformer3DModel.from_pretrained(wan_folder, subfolder="transformer", dtype=torch.bfloat16)
    meta = build_meta(model_configs(wan_folder)["transformer"], torch.bfloat16)
    expected = {name: weight.dtype for name, weight in loaded.state_dict().items()}
    assert {name: weight.dtype for name, weight in meta.state_dict().items()} == expected
    # both occur, so that the comparison says something
    assert {torch.float32, torch.bfloat16} == set(expected.values())


def test_a_lora_target_that_fits_no_layer_is_named(wan_folder):
    model = build_meta(model_configs(wan_folder)["transformer"], torch.float32)
    with pytest.raises(
        RecipeError, match=r"no linear layer of WanTransformer3DModel is called to_qq; did you mean to_q\?"
    ):
        add_meta_lora(model, 4, 4, ("to_k", "to_qq"))


def test_lora_parameters_match_a_real_adapter(wan, wan_folder):
    from ldo.models import lora

    parameters = lora.add({"transformer": wan.transformer}, 4, 8, wan.lora_targets, 0)
    count = sum(parameter.numel() for parameter in parameters.values())
    meta = build_meta(model_configs(wan_folder)["transformer"], torch.float32)
    assert add_meta_lora(meta, 4, 8, tuple(wan.lora_targets)) == count

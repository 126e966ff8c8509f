"""LoRA adapters, single files and quantized weights: what users have besides pipeline folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from tests import worlds
from tests.families import FAMILIES, write_lora
from tests.worlds import generators, in_parts, settings
from ttsnap_lib.diffusion.denoise import Denoiser
from ttsnap_lib.diffusion.pipelines import load_pipeline
from ttsnap_lib.errors import ConfigError, PipelineError
from ttsnap_lib.trajectories.identity import weights_digest

CPU = {"device": "cpu"}
PIECES = ("sdxl", "flux", "z-image")

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(pipeline: Any) -> torch.Tensor:
    return in_parts(Denoiser(pipeline, settings()), (2, 5))[0].latents


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    for name in PIECES:
        FAMILIES[name].build().save_pretrained(root / name)
    return {name: root / name for name in PIECES}


# LoRA


@pytest.mark.parametrize("name", PIECES)
def test_a_lora_is_what_diffusers_makes_of_it(folders, name, tmp_path):
    first, second = (write_lora(name, tmp_path / str(seed), seed) for seed in (0, 1))
    plain = load_pipeline(folders[name], **CPU)
    without = latents(plain)
    plain.load_lora_weights(str(first), adapter_name="a")
    plain.load_lora_weights(str(second), adapter_name="b")
    plain.set_adapters(["a", "b"], [0.5, 1.0])
    ours = load_pipeline(folders[name], lora=[f"{first}:0.5", str(second.parent)], **CPU)
    assert torch.equal(latents(ours), latents(plain)) and not torch.equal(latents(ours), without)
    fused = load_pipeline(folders[name], lora=str(first), **CPU)
    apart = latents(fused)
    fused.fuse_lora()
    worlds.same_to(latents(fused), apart, 1e-5)


def test_loras_that_cannot_be_had(folders, tmp_path):
    other = write_lora("flux", tmp_path / "flux")
    wide = tmp_path / "wide.safetensors"
    save_file({"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 999),
               "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.zeros(999, 2)}, wide)  # fmt: skip
    not_lora = tmp_path / "not_lora.safetensors"
    save_file({"weight": torch.zeros(2)}, not_lora)
    for source in (other, wide, not_lora, tmp_path / "none.safetensors"):
        with pytest.raises(PipelineError, match=f"LoRA {source} does not fit this StableDiffusionXLPipeline"):
            load_pipeline(folders["sdxl"], lora=str(source), **CPU)
    with pytest.raises(ConfigError, match="scale 'half'"):
        load_pipeline(folders["sdxl"], lora=f"{other}:half", **CPU)


# Single files


def in_its_authors_layout(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a Z-Image transformer under the names in which they were published."""
    names = {
        "all_final_layer.2-1.": "final_layer.", "all_x_embedder.2-1.": "x_embedder.", "to_out.0": "out",
        "norm_k": "k_norm", "norm_q": "q_norm",
    }  # fmt: skip
    found = {}
    for key, value in weights.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if "to_q" in key:
            fused = [weights[key.replace("to_q", one)] for one in ("to_q", "to_k", "to_v")]
            key, value = key.replace("to_q", "qkv"), torch.cat(fused)
        if "to_k" not in key and "to_v" not in key:
            found[f"model.diffusion_model.{key}"] = value.contiguous()
    return found


def test_a_single_file_of_the_denoising_model(folders, tmp_path):
    whole = load_pipeline(folders["z-image"], **CPU)
    other = FAMILIES["z-image"].build().transformer
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    published, ours = tmp_path / "published.safetensors", tmp_path / "ours.safetensors"
    save_file(in_its_authors_layout(other.state_dict()), published)
    save_file({key: value.contiguous() for key, value in other.state_dict().items()}, ours)
    found = [latents(load_pipeline(file, base=str(folders["z-image"]), **CPU)) for file in (published, ours)]
    before = latents(whole)
    whole.transformer = other
    assert torch.equal(found[0], latents(whole)) and torch.equal(found[1], found[0])
    assert not torch.equal(before, found[0])


def test_single_files_that_cannot_be_loaded(folders, tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    weights = {
        "of no family": ({"weight": torch.zeros(2)}, "of no family that is known.*as its base"),
        "a video model": (
            {"model.diffusion_model.patch_embedding.weight": torch.zeros(1536, 1), "head.modulation": torch.zeros(1)},
            "not supported|no family",
        ),
        "an inpainting model": (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 9)}, "inpainting, which is not supported"
        ),
    }  # fmt: skip
    for content, says in weights.values():
        save_file(content, file)
        with pytest.raises(PipelineError, match=says):
            load_pipeline(file, **CPU)
    with pytest.raises(PipelineError, match=f"{file} is not in one of the layouts of ZImagePipeline"):
        load_pipeline(file, base=str(folders["z-image"]), **CPU)
    file.write_bytes(b"no weights")
    with pytest.raises(PipelineError, match="cannot be read as .safetensors"):
        load_pipeline(file, **CPU)
    with pytest.raises(ConfigError, match="base: got 'x' for a model that is not one"):
        load_pipeline(folders["sdxl"], base="x", **CPU)


# Quantized weights


def _gguf(transformer: Any, path: Path) -> None:
    """Write a transformer as a GGUF file: matrices in 8 bits, where a row can be cut into blocks of 32."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer, kind = gguf.GGUFWriter(path, "flux"), gguf.GGMLQuantizationType.Q8_0
    for name, value in transformer.state_dict().items():
        plain = value.float().numpy()
        if plain.ndim == 2 and plain.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(plain, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "quanto", "gguf"]
)
def test_quantized_weights_are_used_as_diffusers_uses_them(tmp_path, how):
    """bf16, as their libraries want it; another quantization of the same weights is another folder."""
    family = FAMILIES["flux"]
    family.build().save_pretrained(tmp_path)
    cls, options = diffusers.FluxTransformer2DModel, {"subfolder": "transformer", "torch_dtype": torch.bfloat16}
    if how == "gguf":
        _gguf(cls.from_pretrained(tmp_path, subfolder="transformer"), tmp_path / "flux.gguf")
        config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
        model = cls.from_single_file(
            str(tmp_path / "flux.gguf"), config=str(tmp_path), quantization_config=config, **options
        )
    elif how == "quanto":
        pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
        config = diffusers.QuantoConfig(weights_dtype="int8")
        model = cls.from_pretrained(tmp_path, quantization_config=config, **options)
    else:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        config = diffusers.TorchAoConfig(getattr(torchao, how)())
        model = cls.from_pretrained(tmp_path, quantization_config=config, **options)
    pipeline = diffusers.FluxPipeline.from_pretrained(tmp_path, transformer=model, torch_dtype=torch.bfloat16)
    plain = load_pipeline(tmp_path, device="cpu", dtype="bf16")
    for one in (pipeline, plain):
        one.set_progress_bar_config(disable=True)
    denoiser = Denoiser(pipeline, settings(max_sequence_length=worlds.TOKENS))
    given = {"latents": denoiser.noise(generators()).latents, "guidance_scale": denoiser.settings.guidance}
    expected = family.stock(pipeline, "latent", guided=False, **given)
    assert not torch.equal(expected, family.stock(plain, "latent", guided=False, **given))
    for cuts in ((5,), (2, 5), (0, 2, 3, 5)):
        assert torch.equal(in_parts(denoiser, cuts)[0].latents, expected), cuts
    assert weights_digest(pipeline) not in (None, weights_digest(plain))

"""What decides the bytes of a folder: also what is set at run time, and weights however they are quantized."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig

from tests import worlds
from ttsnap_lib.diffusion.denoise import Denoiser, Settings
from ttsnap_lib.errors import SearchError, TrajectoryError
from ttsnap_lib.live.many import search_many
from ttsnap_lib.trajectories.generate import generate
from ttsnap_lib.trajectories.identity import decoder_digest, identity_of, weights_digest
from ttsnap_lib.trajectories.layout import MANIFEST, Manifest
from ttsnap_lib.trajectories.read import Trajectories

SETTINGS = Settings(n_steps=2, height=32, width=32)
OPTIONS = {"settings": SETTINGS, "images_per_prompt": 1, "batch_size": 1, "cpu_threads": 1}
PROMPT = ["a red circle"]


def with_lora(names=("style",)):
    """Return a pipeline with LoRA adapters of random weights, on and at scale 1 as they are after loading."""
    pipe = worlds.build("sdxl")
    for seed, name in enumerate(names):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False), name)  # fmt: skip
    pipe.unet.set_adapters(list(names))
    return pipe


CHANGES = {
    "another LoRA scale": (lambda pipe: pipe.unet.set_adapters(["style"], [0.5]), "lora.unet.style: None there, 0.5 now"),
    "LoRA off": (lambda pipe: pipe.unet.disable_adapters(), r"lora.unet.style: None there, 0.0 now"),
    "LoRA fused": (lambda pipe: pipe.fuse_lora(["unet"]), "weights"),
    "LoRA fused at half": (lambda pipe: pipe.fuse_lora(["unet"], lora_scale=0.5), "weights"),
    "FreeU": (lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.1, 1.2), r"freeu: None there, \[\[0.9, 0.2, 1.1, 1.2\]"),
    "tiles": (lambda pipe: pipe.vae.enable_tiling(), "vae_in_parts.use_tiling: None there, True now"),
    "another scale of latents": (
        lambda pipe: pipe.vae.register_to_config(scaling_factor=0.4), "vae.scaling_factor: 0.5 there, 0.4 now"
    ),
    "an attribute of the scheduler": (
        lambda pipe: vars(pipe.scheduler).update(my_strength=0.5), "scheduler_set.my_strength: None there, '0.5' now"
    ),
    "a VAE of another precision": (lambda pipe: pipe.vae.bfloat16().float(), "weights"),
    "the same weights in another precision": (lambda pipe: pipe.vae.double(), "dtypes.vae: None there, 'float64' now"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a folder with a LoRA as it was loaded."""
    folder = tmp_path_factory.mktemp("plain") / "set"
    generate(with_lora(), PROMPT, folder, **OPTIONS)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_set_at_run_time_needs_a_folder_of_its_own(name, plain, tmp_path):
    change, says = CHANGES[name]
    pipe = with_lora()
    change(pipe)
    with pytest.raises(TrajectoryError, match=says):
        generate(pipe, PROMPT, plain, **OPTIONS)
    report = [generate(pipe, PROMPT, tmp_path, **OPTIONS) for _ in range(2)]
    assert [(one.made, one.found) for one in report] == [(1, 0), (0, 1)]


def test_a_lora_scale_decides_the_bytes_and_what_is_set_back_is_found(plain, tmp_path):
    pipe = with_lora()
    pipe.unet.set_adapters(["style"], [0.5])
    generate(pipe, PROMPT, tmp_path, **OPTIONS)
    assert (Trajectories(tmp_path).read(0, 0, -1) != Trajectories(plain).read(0, 0, -1)).any()
    pipe.unet.set_adapters(["style"], [1.0])
    pipe.enable_freeu(0.9, 0.2, 1.1, 1.2)
    pipe.disable_freeu()
    pipe.vae.enable_tiling()
    pipe.vae.disable_tiling()
    assert generate(pipe, PROMPT, plain, **OPTIONS).found == 1


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_which_of_several_adapters_are_on_and_scales_by_layer():
    pipe = with_lora(("style", "other"))
    denoiser = Denoiser(pipe, SETTINGS)
    told = [identity_of(denoiser)]
    for names, scales in ((["style"], [1.0]), (["other"], [1.0]), (["style", "other"], [0.5, 2.0])):
        pipe.unet.set_adapters(names, scales)
        told.append(identity_of(denoiser))
    assert [one.get("lora") for one in told] == [
        None,
        {"unet": {"style": 1.0, "other": 0.0}},
        {"unet": {"style": 0.0, "other": 1.0}},
        {"unet": {"style": 0.5, "other": 2.0}},
    ]
    pipe.unet.set_adapters(["style", "other"], [{"down": 1.0, "mid": 1.0, "up": 0.5}, 1.0])
    one = identity_of(denoiser)["lora"]["unet"]
    pipe.unet.set_adapters(["style", "other"], [{"down": 0.5, "mid": 1.0, "up": 1.0}, 1.0])
    other = identity_of(denoiser)["lora"]["unet"]
    assert one["other"] == other["other"] == 1.0 and one["style"] != other["style"]


def test_a_folder_that_does_not_tell_is_found(tmp_path):
    """Folders made before the new facts were written have neither of their keys."""
    pipe = worlds.build("sdxl")
    generate(pipe, PROMPT, tmp_path, **OPTIONS)
    content = json.loads((tmp_path / MANIFEST).read_text())
    assert not {"lora", "freeu", "vae_in_parts", "dtypes"} & content["identity"].keys()
    del content["identity"]["vae"], content["identity"]["timesteps"]
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    assert generate(pipe, PROMPT, tmp_path, **OPTIONS).found == 1


def test_a_model_cache_is_told():
    pipe = worlds.build("flux")
    assert "cache" not in identity_of(Denoiser(pipe, SETTINGS))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    assert "FirstBlockCacheConfig(threshold=0.5)" in identity_of(Denoiser(pipe, SETTINGS))["cache"]


@pytest.mark.parametrize("which", ["sigmas", "timesteps"])
def test_a_pool_of_a_version_with_another_schedule_is_refused(which, tmp_path):
    """Diffusers changes how schedules are computed between versions."""
    pipe = worlds.build("sdxl")
    generate(pipe, PROMPT, tmp_path, **OPTIONS)
    content = json.loads((tmp_path / MANIFEST).read_text())
    assert content["identity"]["timesteps"] == Denoiser(pipe, SETTINGS).timesteps.tolist()
    content["identity"][which][0] += 1
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(TrajectoryError, match=rf"other settings: {which}: \["):
        generate(pipe, PROMPT, tmp_path, **OPTIONS)


def test_a_prompt_file_is_not_searched_with_two_lora_scales_in_one_folder(tmp_path):
    pipe = with_lora()
    options = {"candidates": 2, "settings": SETTINGS}
    search_many(pipe, PROMPT, worlds.brightness, tmp_path, **options)
    pipe.unet.set_adapters(["style"], [0.5])
    with pytest.raises(SearchError, match=r"lora.unet.style: None there, 0.5 now"):
        search_many(pipe, PROMPT, worlds.brightness, tmp_path, **options)


def test_a_prompt_file_is_not_searched_with_two_schedules_of_noise_in_one_folder(tmp_path):
    pipe = worlds.build("sdxl")
    options = {"candidates": 2, "settings": SETTINGS}
    search_many(pipe, PROMPT, worlds.brightness, tmp_path, **options)
    record = tmp_path / "search.json"
    known = json.loads(record.read_text())
    record.write_text(
        json.dumps({key: value for key, value in known.items() if key not in ("scheduler", "sigmas", "dtype", "vae")})
    )
    search_many(pipe, PROMPT, worlds.brightness, tmp_path, **options)  # an older record does not tell
    record.write_text(json.dumps(known))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(SearchError, match="(?s)scheduler.config.timestep_spacing.*sigmas"):
        search_many(pipe, PROMPT, worlds.brightness, tmp_path, **options)


# Quantized weights


class Wrapped(torch.Tensor):
    """An int8 weight with a scale per row as torchao keeps it: computes, and refuses most of what a tensor does."""

    @staticmethod
    def __new__(cls, values, scale, kind="int8"):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale, kind="int8"):
        self.values, self.scale, self.kind = values, scale, kind

    def __tensor_flatten__(self):
        return ["values", "scale"], [self.kind, object()]  # the default text of an object holds its address

    @classmethod
    def __tensor_unflatten__(cls, inner, how, size, stride):
        return cls(inner["values"], inner["scale"], how[0])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale, args[0].kind)
        raise NotImplementedError(f"{cls.__name__} dispatch: no implementation of {func}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            pixels, weight, bias = args
            return func(pixels, weight.values * weight.scale, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Packed(torch.nn.Parameter):
    """A weight as GGUF packs it: bytes whose number of columns has to be whole blocks, as in diffusers' GGUFParameter."""

    def __new__(cls, data, requires_grad=False, quant_type=None):
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.quant_type = quant_type
        assert self.shape[-1] % 4 == 0
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return cls(result, quant_type=args[0].quant_type) if isinstance(result, torch.Tensor) else result


class PackedLinear(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        scale = float(linear.weight.detach().abs().max()) / 127
        values = (linear.weight / scale).round().to(torch.int8).view(torch.uint8)
        self.weight = Packed(torch.nn.functional.pad(values, (0, 4)), quant_type=8)  # "4": bytes of a block's scale
        self.scale, self.bias = scale, linear.bias

    def forward(self, pixels):
        plain = torch.Tensor._make_subclass(torch.Tensor, self.weight)[:, :-4].view(torch.int8).to(pixels.dtype)
        return torch.nn.functional.linear(pixels, plain * self.scale, self.bias)


def dynamic_int8(pipe):
    with warnings.catch_warnings(action="ignore"):  # torch moves this to torchao
        pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear}, torch.qint8)


def like_torchao(pipe, kind="int8"):
    for layer in pipe.unet.modules():
        if isinstance(layer, torch.nn.Linear):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            values = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = torch.nn.Parameter(Wrapped(values, scale, kind), requires_grad=False)


def like_gguf(pipe):
    for layer in list(pipe.unet.modules()):
        for name, child in list(layer.named_children()):
            if isinstance(child, torch.nn.Linear) and "to_" in name:
                setattr(layer, name, PackedLinear(child))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization")
@pytest.mark.parametrize("quantize", [dynamic_int8, like_torchao, like_gguf])
def test_quantized_weights_have_a_digest(quantize, tmp_path):
    digests, found = set(), []
    for seed in (0, 0, 1):
        pipe = worlds.build("sdxl")
        generator = torch.Generator().manual_seed(seed)
        for layer in pipe.unet.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data += seed * torch.randn(layer.weight.shape, generator=generator)
        digests.add(weights_digest(pipe))
        quantize(pipe)
        digests.add(weights_digest(pipe))
        assert decoder_digest(pipe.unet).split()[1] != "None"
        if seed == 0:
            found.append(generate(pipe, PROMPT, tmp_path / "set", **OPTIONS).found)
        else:
            with pytest.raises(TrajectoryError, match="weights"):
                generate(pipe, PROMPT, tmp_path / "set", **OPTIONS)
    assert found == [0, 1]
    assert len(digests) == 4 and None not in digests  # plain and quantized, of two models
    search_many(pipe, PROMPT, worlds.brightness, tmp_path / "found", candidates=2, settings=SETTINGS)
    assert Manifest.read(tmp_path / "set").identity["weights"] in digests


def test_how_weights_are_quantized_is_told_too():
    def digest_of(kind):
        pipe = worlds.build("sdxl")
        like_torchao(pipe, kind)
        return weights_digest(SimpleNamespace(components=pipe.components))

    assert digest_of("weight only") == digest_of("weight only") != digest_of("weight and activation")

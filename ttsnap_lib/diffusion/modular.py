"""FLUX.3 and Anima, which diffusers offers as modular blocks alone, behind the face of a stock pipeline.

The blocks of the modular pipeline do the work; their loop is walked here, with each step's index in the whole schedule,
since the distilled model is told the timestep that a step goes to, and a guider may go by the index.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import diffusers
import torch

from ttsnap_lib.errors import PipelineError

_LENGTH = 512  # tokens of a prompt; the blocks' own default of 8192 is for upsampled ones


class ModularFace:
    """A modular pipeline as the engine drives stock ones; what is not here is the modular pipeline's own.

    Prompts are encoded as they are given: the prompt upsampler is left out, since a reward judges the prompt that it is
    shown. Windows of text differ in length by prompt and the model looks at their padding too, so that prompts of another
    length run apart within a step.
    """

    def __init__(self, modular: Any) -> None:
        self.modular = modular
        self.scheduler = modular.scheduler
        guider = getattr(modular, "guider", None)
        if guider is not None and type(guider).__name__ != "ClassifierFreeGuidance":
            raise PipelineError(
                f"guider: got {type(guider).__name__}, expected ClassifierFreeGuidance: others remember earlier steps, "
                "which are not there when a search goes on. Use update_components(guider=ClassifierFreeGuidance(...))."
            )
        self.guider = copy.copy(guider)
        self.requires_unconditional_embeds = False  # negative prompts are encoded as prompts are
        self.ttsnap_defaults = {} if guider is None else {"guidance": guider.guidance_scale}
        blocks = modular.blocks.get_execution_blocks(prompt=True).sub_blocks
        parts = {name.removeprefix("denoise."): block for name, block in blocks.items() if name.startswith("denoise.")}
        self._text = [blocks["text_encoder"], *filter(None, [parts.pop("text_conditioning", None)])]
        self._loop = parts.pop("denoise")
        parts.pop("after_denoise", None)  # brings tokens back to a grid
        self._before = list(parts.values())

    def __getattr__(self, name: str) -> Any:
        if name == "modular":  # not there yet, in a copy
            raise AttributeError(name)
        return getattr(self.modular, name)

    def encode_prompt(
        self, prompt: Sequence[str], device: Any = None, max_sequence_length: int = _LENGTH
    ) -> tuple[list[torch.Tensor]]:
        """Return the embeddings (tokens, width) of each prompt."""
        if self.guider is not None:
            self.guider.guidance_scale = 1.0  # or each prompt would be encoded with a negative one
        found = [
            self._state(self._text, prompt=text, max_sequence_length=max_sequence_length).get("prompt_embeds")[0]
            for text in prompt
        ]
        return (found,)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Sequence[torch.Tensor],
        latents: torch.Tensor,
        negative_prompt_embeds: Sequence[torch.Tensor] | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.5,
        max_sequence_length: int = _LENGTH,  # said where prompts are encoded
        output_type: str = "latent",
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """Run the timesteps that the scheduler shows on `latents`; return them as the loop keeps them."""
        if self.guider is not None:
            self.guider.guidance_scale = guidance_scale
        lengths = [
            (len(prompt_embeds[row]), len(negative_prompt_embeds[row]) if negative_prompt_embeds else 0)
            for row in range(len(latents))
        ]
        groups = [[row for row, own in enumerate(lengths) if own == length] for length in dict.fromkeys(lengths)]
        states = []
        for rows in groups:
            given: dict[str, Any] = {
                "prompt_embeds": torch.stack([prompt_embeds[row] for row in rows]),
                "latents": latents[rows],
            }
            if negative_prompt_embeds:
                given["negative_prompt_embeds"] = torch.stack([negative_prompt_embeds[row] for row in rows])
            given |= {"height": height, "width": width, "num_inference_steps": num_inference_steps}
            given["num_images_per_prompt"] = 1  # diffusers 0.39 has no defaults here
            states.append(self._loop.get_block_state(self._state(self._before, **given)))
        return (self._walk(groups, states),)

    def _walk(self, groups: list[list[int]], states: list[Any]) -> torch.Tensor:
        """Walk over the loop's timesteps; the model runs by groups of rows, the scheduler once for all of them."""
        order = torch.tensor([row for rows in groups for row in rows]).argsort()
        *models, after = self._loop.sub_blocks.values()
        shown, whole = self.scheduler.timesteps, getattr(self.scheduler, "_whole", self.scheduler.timesteps)
        latents = torch.cat([state.latents for state in states])[order]
        for index, t in enumerate(shown, start=getattr(self.scheduler, "_first", 0)):
            for rows, state in zip(groups, states, strict=True):
                state.timesteps, state.num_inference_steps, state.latents = whole, len(whole), latents[rows]
                for block in models:
                    block(self, state, i=index, t=t)
            merged = copy.copy(states[0])
            merged.latents, merged.noise_pred = latents, torch.cat([state.noise_pred for state in states])[order]
            after(self, merged, i=index, t=t)
            latents = merged.latents
        return latents

    def _state(self, blocks: Sequence[Any], **values: Any) -> Any:
        """Run blocks one after the other on a state of these values, and return it."""
        from diffusers.modular_pipelines import PipelineState  # not with diffusers: 0.3 s

        state = PipelineState()
        for name, value in values.items():
            state.set(name, value)
        for block in blocks:
            block(self, state)
        return state

    def to(self, *args: Any, **kwargs: Any) -> ModularFace:
        """Move the parts, in place, and return this."""
        self.modular.to(*args, **kwargs)
        return self

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: a components manager moves the parts itself."""


class Flux3ModularPipeline(ModularFace):
    """FLUX.3, with classifier-free guidance."""


class Flux3DistilledModularPipeline(ModularFace):
    """FLUX.3 distilled to few steps, without guidance."""


class AnimaModularPipeline(ModularFace):
    """Anima, with classifier-free guidance."""


FACES = {face.__name__: face for face in (Flux3ModularPipeline, Flux3DistilledModularPipeline, AnimaModularPipeline)}
"""The faces by the name of the class of diffusers."""


def faced(pipeline: Any) -> Any:
    """Return `pipeline` as the engine drives it: a modular one behind its face, any other as it is."""
    face = None if isinstance(pipeline, ModularFace) else FACES.get(type(pipeline).__name__)
    return pipeline if face is None else face(pipeline)


def load_modular(kind: str, source: str, options: dict[str, Any], **loading: Any) -> Any:
    """Return the face of the modular pipeline of class `kind` at `source`, with the parts that text to image needs."""
    modular = diffusers.ModularPipeline.from_pretrained(source, trust_remote_code=False, **options)
    blocks = modular.blocks.get_execution_blocks(prompt=True).sub_blocks
    parts = dict.fromkeys(
        spec.name
        for name, block in blocks.items()
        if not name.startswith("prompt_upsampler")
        for spec in block.expected_components
        if modular.get_component_spec(spec.name).default_creation_method == "from_pretrained"
    )
    modular.load_components(names=list(parts), **loading)  # only logs what it cannot load
    missing = [name for name in parts if getattr(modular, name, None) is None]
    if missing:
        raise PipelineError(
            f"model {source}: its {missing} cannot be loaded. Download it again; diffusers told why above."
        )
    return FACES[kind](modular)

"""Vision-language models as rewards: HPSv3, and the probability of "Yes" to a question about the picture (VQAScore)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ttsnap_lib.checks import text as checked_text
from ttsnap_lib.errors import RewardError
from ttsnap_lib.rewards.base import Reward, TextBatch, as_pil
from ttsnap_lib.rewards.checkpoints import fetch, load_strict, read_state, refuse_keys
from ttsnap_lib.rewards.towers import pretrained

VQA_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'
"""The question of the t2v_metrics package, with the prompt in the place of ``{prompt}``."""
_ANSWER = "Yes"
_EXPECTED = "a vision-language model, its tokenizer, its image processor and its chat template"

_HPS_MODEL = "Qwen/Qwen2-VL-7B-Instruct"
_HPS_FILE = ("MizzenAI/HPSv3", "HPSv3.safetensors")
_HPS_AREA = 256 * 28 * 28  # pixels, of 256 image tokens
_HPS_TOKEN = "<|Reward|>"
# As published, with the blanks at the ends of lines.
_HPS_INSTRUCTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the best.\x20

**Visual Quality:** \x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:** \x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {prompt}



Please provide the overall ratings of this image: <|Reward|>

END
"""


class VlmReward(Reward):
    """A model that reads a picture and a text about it in one forward; it takes pictures as they are.

    Families fill in :meth:`forward`. `template` is the text, with the prompt in the place of ``{prompt}``; `padding` the
    side on which shorter texts of a batch are filled up.
    """

    module: Any
    template: str
    padding = "right"

    def __init__(self, name: str, module: torch.nn.Module, processor: Any, **options: Any) -> None:
        super().__init__(name, module, **options)
        self.processor = processor
        processor.tokenizer.padding_side = self.padding
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        for parameter in module.parameters():  # not the buffers: frequencies of positions want float32
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)
        module.to(self.device).eval()

    def inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Mapping[str, Any]:
        """Return what the model's own processor makes of pictures and one prompt each, on the device."""
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.template.replace("{prompt}", prompt)}]}]
            for prompt in prompts
        ]  # fmt: skip
        texts = self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        images = [[picture] for picture in pictures]
        return self.processor(text=texts, images=images, padding=True, return_tensors="pt").to(self.device, self.dtype)

    def _score_batch(self, prompts: list[str], images: Any, metadata: list[dict[str, Any]]) -> torch.Tensor:
        forward: Any = self._compiled or self.forward
        return self._one_each(forward(self.inputs(prompts, as_pil(images)), None).float(), len(prompts))


class VqaReward(VlmReward):
    """The probability of "Yes" as the first word of the answer to a question about the picture, 0 to 1.

    Parameters
    ----------
    name : str
        The name under which scores are kept.
    module : transformers model
        Any of `AutoModelForImageTextToText`.
    processor : transformers processor
        With a chat template.
    question : str
        The question, with ``{prompt}`` where the prompt goes.
    options : Any
        Device, dtype and batch_size, as :class:`Reward` takes them.
    """

    padding = "left"  # so that all answers begin at the last position

    def __init__(self, name: str, module: Any, processor: Any, *, question: str = QUESTION, **options: Any) -> None:
        self.template = self.settings = check_question(question)
        answer = processor.tokenizer.encode(_ANSWER, add_special_tokens=False)
        if len(answer) != 1:
            raise RewardError(
                f"tokenizer of {name}: got {len(answer)} tokens for {_ANSWER!r}, expected one, whose probability is the reward. "
                f"Use another model, such as {VQA_MODEL}."
            )
        self._answer = answer[0]
        super().__init__(name, module, processor, **options)
        takes = inspect.signature(module.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}  # else the logits of every token

    def forward(self, pixels: Any, text: TextBatch | Sequence[str] | None) -> torch.Tensor:
        """Return the probabilities (n,) for what :meth:`inputs` returns."""
        logits = self.module(**pixels, use_cache=False, **self._last).logits[:, -1]
        return logits.float().softmax(-1)[:, self._answer]


class Hpsv3Scorer(torch.nn.Module):
    """A `Qwen2VLModel` named `model`, and the `rm_head` that reads its reward token: a mean, and the log of a deviation."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        linear, relu = torch.nn.Linear, torch.nn.ReLU
        self.model = model
        self.rm_head = torch.nn.Sequential(
            linear(model.config.text_config.hidden_size, 1024), relu(), torch.nn.Dropout(0.05), linear(1024, 16), relu(),
            linear(16, 2),
        )  # fmt: skip


class Hpsv3Reward(VlmReward):
    """The mean of HPSv3, any number; with `sigma` also the deviation it gives, as a second number."""

    template = _HPS_INSTRUCTION

    def __init__(self, name: str, module: Hpsv3Scorer, processor: Any, *, sigma: bool = False, **options: Any) -> None:
        super().__init__(name, module, processor, **options)
        self.outputs = ("mean", "sigma") if sigma else ()
        self._token = processor.tokenizer.convert_tokens_to_ids(_HPS_TOKEN)
        module.rm_head.float()
        for kind, buffer in module.named_buffers():
            if kind.endswith("inv_freq"):  # the authors cast the whole model to bfloat16, and trained it so
                buffer.copy_(buffer.bfloat16())

    def inputs(self, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Mapping[str, Any]:
        """Return the processor's inputs of pictures that are resized to about 256 tokens first, as published."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        def resized(picture: Image.Image) -> Image.Image:
            factor = self.processor.image_processor.patch_size * self.processor.image_processor.merge_size
            height, width = smart_resize(picture.height, picture.width, factor, _HPS_AREA, _HPS_AREA)
            return picture.resize((width, height), Image.Resampling.BICUBIC)

        return super().inputs(prompts, [resized(picture) for picture in pictures])

    def forward(self, pixels: Any, text: TextBatch | Sequence[str] | None) -> torch.Tensor:
        """Return the means (n,), or means and deviations (n, 2), for what :meth:`inputs` returns."""
        mask, ids = pixels["attention_mask"], pixels["input_ids"]
        # Image tokens are counted like words: the authors' forward leaves out Qwen's positions in two dimensions.
        positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        hidden = self.module.model(**pixels, position_ids=positions, use_cache=False).last_hidden_state
        last = ((ids == self._token) * torch.arange(ids.shape[1], device=ids.device)).argmax(-1)
        found = self.module.rm_head(hidden[torch.arange(len(ids), device=ids.device), last].float())
        return torch.stack([found[:, 0], found[:, 1].exp()], -1) if self.outputs else found[:, 0]


def check_question(question: Any) -> str:
    """Return a question with a place for the prompt, or raise a RewardError."""
    if "{prompt}" not in checked_text("question", question, error=RewardError):
        raise RewardError(
            f"question: got {question!r}, expected a text with {{prompt}} where the prompt goes. Write for example "
            f"{QUESTION!r}."
        )
    return question


def load_vqascore(
    name: str,
    *,
    model: str | Path = VQA_MODEL,
    question: str = QUESTION,
    revision: str | None = None,
    **options: Any,
) -> VqaReward:
    """Load any vision-language model that transformers knows, from a folder or hub id."""
    from transformers import AutoModelForImageTextToText

    source = str(model)
    check_question(question)
    processor = _processor(source, revision)
    module, info = pretrained(
        AutoModelForImageTextToText.from_pretrained, source, "model", revision, expected=_EXPECTED,
        output_loading_info=True, trust_remote_code=False,
    )  # fmt: skip
    refuse_keys(info["missing_keys"], (), source=source)
    return VqaReward(name, module, processor, question=question, **options)


def load_hpsv3(
    name: str,
    *,
    model: str | Path = _HPS_MODEL,
    weights: str | Path | None = None,
    revision: str | None = None,
    **options: Any,
) -> Hpsv3Reward:
    """Load HPSv3 from a file of its weights, or from the hub; `model` has the configuration and processor of its Qwen2-VL."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    source = str(model)
    processor = _processor(source, None)
    config = pretrained(AutoConfig.from_pretrained, source, "config", None, expected=_EXPECTED, trust_remote_code=False)
    if config.model_type != "qwen2_vl":
        raise RewardError(
            f"model of HPSv3: got a {config.model_type} in {source}, expected a qwen2_vl. Use {_HPS_MODEL}."
        )
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [_HPS_TOKEN]})
    config.text_config.vocab_size = len(processor.tokenizer)  # the authors cut the table of words to these
    path = Path(weights) if weights is not None else fetch(*_HPS_FILE, revision=revision)
    # The names of transformers from 4.52 on, and without the head that predicts words.
    state = {
        re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.(?!language_model\.|visual\.)", "model.language_model.", key)): value
        for key, value in read_state(path).items()
        if not key.startswith("lm_head.")
    }  # fmt: skip
    with init_empty_weights(include_buffers=False):  # the file's tensors take their places
        module = Hpsv3Scorer(Qwen2VLModel(config))
    load_strict(module, state, source=str(path), assign=True)
    return Hpsv3Reward(name, module, processor, **options)


def _processor(source: str, revision: str | None) -> Any:
    from transformers import AutoProcessor

    processor = pretrained(
        AutoProcessor.from_pretrained, source, "processor", revision, expected=_EXPECTED, trust_remote_code=False
    )
    for part in ("image_processor", "tokenizer", "chat_template"):
        if getattr(processor, part, None) is None:
            raise RewardError(
                f"processor of {source}: got a {type(processor).__name__} without {part}, expected {_EXPECTED}. Name a model "
                f"such as {VQA_MODEL}, or save its whole processor beside it."
            )
    return processor

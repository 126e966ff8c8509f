"""Small word tokenizers of the pocket world, for the places of CLIP's and T5's.

Their class is the plain ``PreTrainedTokenizerFast``, which takes tokenizer.json as it is. CLIP's and T5's own classes keep
its words alone since transformers 5, and split text in CLIP's or T5's way: every word would be unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ttsnap_lib.pocket.world import WORDS

CLIP_TOKENS = 12
"""Length of CLIP token rows: begin, at most eight words that carry meaning, end, and room for two more."""
T5_TOKENS = 10
"""Length of T5 token rows (``max_sequence_length`` of the FLUX pipeline)."""
VOCABULARY = ("<pad>", "<unk>", "<s>", "</s>", *sorted(set(WORDS)))
"""All tokens, by id: pad 0, unknown 1, begin 2, end 3, then the words in alphabetical order.

Ids below begin and end are never words, so the end token's id must be named in the CLIP configuration: an
``eos_token_id`` of 2 switches CLIP to a legacy pooling at the largest id.
"""
_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """Return the CLIP tokenizer (begin, words, end, padding)."""
    words = _word_level("<s> $A </s>")
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", model_max_length=CLIP_TOKENS, **_SPECIAL)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Return the T5 tokenizer (words, end, padding)."""
    return PreTrainedTokenizerFast(tokenizer_object=_word_level("$A </s>"), model_max_length=T5_TOKENS, **_SPECIAL)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Return token ids, int64 (n, length of the tokenizer's rows), padded and truncated."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def _word_level(template: str) -> object:
    """Return a word-level tokenizer that leaves out the grammar words, so that a caption is at most eight tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    # A BPE model without merges that takes whole words as they are is a word-level one.
    vocabulary = {word: k for k, word in enumerate(VOCABULARY)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, end_of_word_suffix="</w>", ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\b(a|an|the|of|on|background)\b|[^a-z<>/\s]"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    special = [(token, VOCABULARY.index(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer

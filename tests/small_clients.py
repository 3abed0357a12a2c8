"""Tiny language models with tokenizers, for tests of what asks them."""

from functools import cache

import torch
from small_models import SIZES, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \t\n"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def letters(*, ten: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per character, with or without one for "10"."""
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    merges = [("1", "0")] if ten else []
    model = models.BPE({**vocabulary, "10": len(vocabulary)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@cache
def byte_tokens(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per byte of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({each: i for i, each in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny(family)


@cache
def reader_of_bytes(n_ctx: int = 8192) -> PreTrainedModel:
    """Return a random GPT-2 over bytes with room for whole prompts."""
    sizes = {**SIZES, "vocab_size": 256, "max_position_embeddings": n_ctx}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).eval()

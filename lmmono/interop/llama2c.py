"""Models of karpathy/llama2.c (`.bin`, version 0) as transformers' Llama, tokenizer included.

Version 0 is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a
negative vocab_size means a head of its own) and then float32 tensors in a fixed order. Refuses
the later versions, which start with a magic number.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmmono.errors import ModelError
from lmmono.files.atomic import atomic_folder
from lmmono.models.storage import no_progress_bars

HEADER = struct.Struct("<7i")
MAGIC = 0x616B3432
"""First int of versions 1 and later ("ak42")."""

BOS, EOS = 1, 2
"""Sentencepiece's begin and end tokens; llama2.c starts every text with the first."""


def import_llama2c(
    bin_path: Path | str, out: Path | str, tok_path: Path | str | None = None
) -> Path:
    """Convert a llama2.c model to a folder that `lm.open_model` reads, atomically; return it.

    Args:
        bin_path: The `.bin` of version 0.
        out: The folder to make.
        tok_path: Its `tok*.bin`; the folder then holds the tokenizer too.

    Raises:
        ModelError: As `load_llama2c`, or `out` exists.
    """
    folder = Path(out)
    if folder.exists():
        raise ModelError(f"{folder}: something is there already; choose another folder")
    model, tokenizer = load_llama2c(bin_path, tok_path)
    with atomic_folder(folder) as partial, no_progress_bars():
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return folder


def load_llama2c(
    bin_path: Path | str, tok_path: Path | str | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast | None]:
    """Return the model in eval mode and, where `tok_path` is given, its tokenizer.

    Raises:
        ModelError: A file is missing, cut short or of another version, or the two do not match.
    """
    path = Path(bin_path)
    content = _bytes(path)
    if len(content) < HEADER.size or struct.unpack_from("<i", content)[0] == MAGIC:
        raise ModelError(f"{path}: want a llama2.c .bin of version 0 (export.py --version 0)")
    config, is_tied = _config(path, HEADER.unpack_from(content))
    shapes = dict(_shapes(config, is_tied))
    wanted = HEADER.size + 4 * sum(math.prod(shape) for shape in shapes.values())
    if len(content) != wanted:
        raise ModelError(
            f"{path}: got {len(content):,} bytes, its header wants {wanted:,}; copy it again"
        )
    model = LlamaForCausalLM(config)
    model.load_state_dict(_weights(content, shapes, config), strict=is_tied is False)
    model.tie_weights()
    tokenizer = None if tok_path is None else read_tokenizer(tok_path, d_vocab=config.vocab_size)
    return model.eval(), tokenizer


def read_tokenizer(path: Path | str, *, d_vocab: int) -> PreTrainedTokenizerFast:
    """Return llama2.c's `tok*.bin` (scores and pieces) as a BPE with sentencepiece's rules.

    A text gets a space before it, bytes without a piece fall back to `<0x..>`, and the begin
    token is put in front.

    Raises:
        ModelError: The file is missing, cut short, or holds another number of tokens.
    """
    file = Path(path)
    pieces = list(_pieces(file))
    if len(pieces) != d_vocab:
        raise ModelError(f"{file}: holds {len(pieces)} tokens, the model has {d_vocab}")
    bpe = Tokenizer(_bpe(pieces))
    bpe.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    bpe.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    return path.read_bytes()


def _config(path: Path, header: tuple[int, ...]) -> tuple[LlamaConfig, bool]:
    dim, hidden, n_layers, n_heads, n_kv_heads, d_vocab, n_ctx = header
    sizes = (dim, hidden, n_layers, n_heads, n_kv_heads, abs(d_vocab), n_ctx)
    if min(sizes) < 1 or dim % (2 * n_heads) or n_heads % n_kv_heads:
        raise ModelError(f"{path}: its header {header} is no llama2.c header of version 0")
    config = LlamaConfig(
        vocab_size=abs(d_vocab),
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=n_ctx,
        rms_norm_eps=1e-5,
        tie_word_embeddings=d_vocab > 0,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return config, d_vocab > 0


def _shapes(config: LlamaConfig, is_tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the file's tensors in order; names with {} hold one tensor per layer."""
    n_layers, dim = config.num_hidden_layers, config.hidden_size
    hidden, d_head = config.intermediate_size, dim // config.num_attention_heads
    d_kv = d_head * (config.num_key_value_heads or config.num_attention_heads)
    yield "model.embed_tokens.weight", (config.vocab_size, dim)
    yield "model.layers.{}.input_layernorm.weight", (n_layers, dim)
    yield "model.layers.{}.self_attn.q_proj.weight", (n_layers, dim, dim)
    yield "model.layers.{}.self_attn.k_proj.weight", (n_layers, d_kv, dim)
    yield "model.layers.{}.self_attn.v_proj.weight", (n_layers, d_kv, dim)
    yield "model.layers.{}.self_attn.o_proj.weight", (n_layers, dim, dim)
    yield "model.layers.{}.post_attention_layernorm.weight", (n_layers, dim)
    yield "model.layers.{}.mlp.gate_proj.weight", (n_layers, hidden, dim)
    yield "model.layers.{}.mlp.down_proj.weight", (n_layers, dim, hidden)
    yield "model.layers.{}.mlp.up_proj.weight", (n_layers, hidden, dim)
    yield "model.norm.weight", (dim,)
    # cosines and sines of the rotary embedding, which transformers computes itself
    yield "rotary", (2, config.max_position_embeddings, d_head // 2)
    if not is_tied:
        yield "lm_head.weight", (config.vocab_size, dim)


def _weights(
    content: bytes, shapes: dict[str, tuple[int, ...]], config: LlamaConfig
) -> dict[str, Tensor]:
    """Cut the file into named weights, query and key reordered for transformers' rotary."""
    d_head = config.hidden_size // config.num_attention_heads
    weights: dict[str, Tensor] = {}
    offset = HEADER.size
    for name, shape in shapes.items():
        count = math.prod(shape)
        values = np.frombuffer(content, dtype="<f4", count=count, offset=offset).copy()
        tensor = torch.from_numpy(values).view(shape)
        offset += 4 * count
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = _halves_from_pairs(tensor, d_head)
        layers = enumerate(tensor) if "{}" in name else [(0, tensor)]
        weights |= {name.format(i): weight for i, weight in layers if name != "rotary"}
    return weights


def _halves_from_pairs(weight: Tensor, d_head: int) -> Tensor:
    """Reorder rows of each head: llama2.c turns neighbours, transformers turns halves."""
    heads = weight.unflatten(1, (-1, d_head // 2, 2))
    return heads.transpose(2, 3).reshape(weight.shape)


def _pieces(path: Path) -> Iterator[tuple[float, str]]:
    """Yield score and piece, spaces written as sentencepiece writes them."""
    content, offset = _bytes(path), 4
    while offset < len(content):
        try:
            score, length = struct.unpack_from("<fi", content, offset)
            (piece,) = struct.unpack_from(f"<{length}s", content, offset + 8)
            text = piece.decode("utf-8")
        except (struct.error, UnicodeDecodeError) as fault:
            raise ModelError(
                f"{path}: truncated or damaged at byte {offset}; copy it again"
            ) from fault
        offset += 8 + length
        yield score, text.replace(" ", "▁")


def _bpe(pieces: list[tuple[float, str]]) -> models.BPE:
    """Return the BPE that merges, like sentencepiece, towards the best-scored piece."""
    names = {0: "<unk>", BOS: "<s>", EOS: "</s>"}
    vocab = {names.get(i, piece): i for i, (_, piece) in enumerate(pieces)}
    ranked = sorted(range(3, len(pieces)), key=lambda i: -pieces[i][0])
    merges = [
        (piece[:cut], piece[cut:])
        for piece in (pieces[i][1] for i in ranked)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    options: Any = {"unk_token": "<unk>", "fuse_unk": False, "byte_fallback": True}
    return models.BPE(vocab, merges, **options)

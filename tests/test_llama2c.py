"""A trained llama2.c model: loads, speaks, tokenizes as llama2.c does, and its neurons are seen."""

import struct
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lmmono.errors import ModelError
from lmmono.interop.llama2c import load_llama2c, read_tokenizer
from lmmono.models.hooks import Edit, recording, run_with_edit


@pytest.fixture
def files(shared) -> tuple[Path, Path]:
    folder = shared / "data" / "models_llama2c"
    return folder / "stories260K.bin", folder / "stories260K_tok512.bin"


@pytest.fixture
def stories(shared) -> list[str]:
    path = shared / "data" / "lm_tinystories_sample" / "stories.parquet"
    return pq.read_table(path)["text"].to_pylist()


def llama2c_pieces(path: Path) -> list[tuple[float, bytes]]:
    content, offset, pieces = path.read_bytes(), 4, []
    while offset < len(content):
        score, length = struct.unpack_from("<fi", content, offset)
        pieces.append((score, content[offset + 8 : offset + 8 + length]))
        offset += 8 + length
    return pieces


def llama2c_encode(text: str, pieces: list[tuple[float, bytes]]) -> list[int]:
    """Encode as run.c does: a space, then characters or bytes + 3, then the best merge, again."""
    ids = {piece: i for i, (_, piece) in enumerate(pieces)}
    tokens = [ids[b" "]]
    for letter in text:
        known = ids.get(letter.encode())
        tokens += [byte + 3 for byte in letter.encode()] if known is None else [known]
    while True:
        best, place, merged = -1e10, -1, -1
        for i in range(len(tokens) - 1):
            both = ids.get(pieces[tokens[i]][1] + pieces[tokens[i + 1]][1])
            if both is not None and pieces[both][0] > best:
                best, place, merged = pieces[both][0], i, both
        if place < 0:
            return [1, *tokens]
        tokens[place : place + 2] = [merged]


def test_the_tokenizer_encodes_as_llama2c_and_decodes_back(files, stories):
    pieces = llama2c_pieces(files[1])
    tokenizer = read_tokenizer(files[1], d_vocab=512)
    for text in [*stories[:12], "Zoë's café,\n\tnaïve 你好 2024!", " two  spaces "]:
        assert tokenizer.encode(text) == llama2c_encode(text, pieces)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_mean_loss_on_stories_is_what_its_author_reports(files, stories):
    model, tokenizer = load_llama2c(*files)
    total, count = 0.0, 0
    for story in stories[:60]:
        ids = torch.tensor([tokenizer.encode(story)[:512]])
        with torch.no_grad():
            n_targets = ids.shape[1] - 1
            total += model(ids, labels=ids).loss.item() * n_targets
            count += n_targets
    assert count > 15_000
    assert total / count == pytest.approx(1.297, abs=0.01)


def test_greedy_text_is_the_golden_text_of_llama2c(files):
    # doc/stories260K.md of llama2.c: ./run stories260K.bin -z tok512.bin -t 0.0
    golden = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the"
    )
    model, tokenizer = load_llama2c(*files)
    start = torch.tensor([[1]])
    new = model.generate(start, max_new_tokens=60, do_sample=False, pad_token_id=2)
    assert tokenizer.decode(new[0], skip_special_tokens=True).strip().startswith(golden)


def test_its_neurons_are_recorded_and_matter(files, stories):
    model, tokenizer = load_llama2c(*files)
    ids = torch.tensor([tokenizer.encode(story)[:128] for story in stories[:4]])
    with torch.no_grad(), recording(model, "blocks.*.mlp.hook_post") as record:
        loss = model(ids, labels=ids).loss
    assert [tuple(acts.shape) for acts in record.values()] == [(4, 128, 172)] * 5
    mlp = model.model.layers[2].mlp
    with torch.no_grad(), recording(model, "blocks.2.ln2.hook_normalized") as norms:
        model(ids)
    x = (
        norms["blocks.2.ln2.hook_normalized"]
        * model.model.layers[2].post_attention_layernorm.weight
    )
    expected = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    torch.testing.assert_close(record["blocks.2.mlp.hook_post"], expected)
    logits = run_with_edit(model, ids, Edit("blocks.2.mlp.hook_post", "ablate"))
    assert next_token_loss(logits, ids) > loss + 0.1


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_a_head_of_its_own_is_read(files, tmp_path):
    content = bytearray(files[0].read_bytes())
    content[20:24] = struct.pack("<i", -512)
    head = torch.randn(512, 64)
    (tmp_path / "untied.bin").write_bytes(bytes(content) + head.numpy().tobytes())
    model, tokenizer = load_llama2c(tmp_path / "untied.bin")
    assert tokenizer is None
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.model.embed_tokens.weight, head)


def test_broken_files_are_refused_with_what_was_wanted(files, tmp_path):
    def refused(content: bytes, match: str) -> None:
        (tmp_path / "model.bin").write_bytes(content)
        with pytest.raises(ModelError, match=match):
            load_llama2c(tmp_path / "model.bin")

    whole = files[0].read_bytes()
    refused(whole[:-4], "got 1,056,536 bytes, its header wants 1,056,540")
    refused(whole + b"1234", "its header wants 1,056,540")
    refused(whole[:10], "want a llama2.c .bin of version 0")
    refused(struct.pack("<i", 0x616B3432) + whole, "want a llama2.c .bin of version 0")
    refused(bytes(28), "is no llama2.c header")
    refused(struct.pack("<7i", 10, 5, 1, 3, 2, 8, 8), "is no llama2.c header")
    with pytest.raises(ModelError, match="no such file"):
        load_llama2c(tmp_path / "absent.bin")


def test_a_tokenizer_of_another_model_is_refused(files, tmp_path):
    with pytest.raises(ModelError, match="holds 512 tokens, the model has 100"):
        read_tokenizer(files[1], d_vocab=100)
    (tmp_path / "tok.bin").write_bytes(files[1].read_bytes()[:-3])
    with pytest.raises(ModelError, match="truncated"):
        load_llama2c(files[0], tmp_path / "tok.bin")


def test_the_verb_writes_a_folder_that_loads_with_its_tokenizer(files, stories, tmp_path):
    import lmmono as lm
    from lmmono.interop.llama2c import import_llama2c

    model, tokenizer = load_llama2c(*files)
    out = import_llama2c(files[0], tmp_path / "stories", files[1])
    ids = torch.tensor([tokenizer.encode(stories[0])[:40]])
    with torch.no_grad():
        assert torch.equal(lm.open_model(out)(ids).logits, model(ids).logits)
    again = PreTrainedTokenizerFast.from_pretrained(out)
    assert again.encode(stories[0]) == tokenizer.encode(stories[0])
    with pytest.raises(ModelError, match="something is there already"):
        import_llama2c(files[0], out)

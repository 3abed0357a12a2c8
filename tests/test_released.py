"""Released checkpoints: read without running them, whole or with a reason why not."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lmmono.errors import ModelError
from lmmono.models.released import import_released
from lmmono.models.storage import load_model

NAMES = ["crate_reference_2l", "gpt2_relu_reference_2l"]


def released(shared: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a fixture's weights under released names, and all its tensors."""
    with safe_open(shared / "fixtures" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {k[len("weight/") :]: v for k, v in tensors.items() if k.startswith("weight/")}
    return weights, tensors


def checkpoint(weights: dict[str, Tensor], prefix: str = "") -> dict[str, object]:
    """Return what the released train.py saves."""
    named = {prefix + name: weight for name, weight in weights.items()}
    named[f"{prefix}lm_head.weight"] = weights["transformer.wte.weight"]
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": False}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 6e-4}]}
    best = {"best_val_loss": torch.tensor(4.2), "iter_num": 600000, "config": {"dataset": "pile"}}
    return {"model": named, "model_args": args, "optimizer": optimizer, **best}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_a_released_checkpoint_becomes_the_model_that_wrote_it(shared, tmp_path, name, prefix):
    weights, tensors = released(shared, name)
    torch.save(checkpoint(weights, prefix), tmp_path / "ckpt.pt")
    model = load_model(import_released(tmp_path / "ckpt.pt", tmp_path / "model"))
    logits = model(tensors["input_ids"]).logits
    assert (logits - tensors["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_zip", [True, False])
def test_a_plain_state_dict_needs_the_number_of_heads(shared, tmp_path, name, as_zip):
    weights, tensors = released(shared, name)
    path = tmp_path / "weights.pt"
    torch.save(weights, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ModelError, match="pass n_heads"):
        import_released(path, tmp_path / "model")
    model = load_model(import_released(path, tmp_path / "model", n_heads=4))
    assert (model(tensors["input_ids"]).logits - tensors["logits"]).abs().max() < 1e-5


def test_a_padded_vocabulary_keeps_its_rows_and_records_the_true_one(shared, tmp_path):
    weights, _ = released(shared, "crate_reference_2l")
    weights["transformer.wte.weight"] = torch.randn(50304, 32)
    torch.save(checkpoint(weights), tmp_path / "ckpt.pt")
    model = load_model(import_released(tmp_path / "ckpt.pt", tmp_path / "model"))
    assert model.config.vocab_size == 50304
    assert model.config.n_tokens == 50257
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 50256
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 50304)
    with torch.no_grad():
        model.model.embed.weight[:50257] = 0
        model.model.ln_final.bias.fill_(1)
        model.model.embed.weight[50300] = 1
    assert model(torch.tensor([[1, 2]])).logits[0, -1].argmax() == 50300
    start = {"inputs": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2)}
    new = model.generate(**start, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert new.max() < 50257


class Evil:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_a_file_that_holds_code_is_refused_and_nothing_runs(tmp_path):
    trace = tmp_path / "ran"
    torch.save({"model": Evil(trace)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Evil(trace)}, protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ModelError, match="runs no code from a file"):
            import_released(tmp_path / name, tmp_path / "model")
    assert not trace.exists()
    assert not (tmp_path / "model").exists()


def test_a_truncated_checkpoint_is_named_with_its_size(shared, tmp_path):
    weights, _ = released(shared, "crate_reference_2l")
    torch.save(checkpoint(weights), tmp_path / "ckpt.pt")
    whole = (tmp_path / "ckpt.pt").read_bytes()
    for kept in (len(whole) // 2, len(whole) - 10, 100, 0):
        broken = tmp_path / f"{kept}.pt"
        broken.write_bytes(whole[:kept])
        with pytest.raises(ModelError, match=rf"{kept}\.pt: "):
            import_released(broken, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_no_released_model_says_what_it_holds(shared, tmp_path):
    def refused(content: object, match: str) -> None:
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ModelError, match=match):
            import_released(tmp_path / "other.pt", tmp_path / "model", n_heads=4)

    refused({"layers.0.weight": torch.zeros(2)}, "neither a released CRATE .* layers.0.weight")
    refused({"step": 3}, "no tensors")
    refused([1, 2], "holds a list, want a dict")
    refused({"model": 3}, "'model' holds a int")
    weights, _ = released(shared, "crate_reference_2l")
    complete = {k: v[:32] if "ista" in k else v for k, v in weights.items()}
    refused(complete, "complete dictionaries")
    lost = {k: v for k, v in weights.items() if "h.1.ista" not in k}
    refused(lost, r"missing model\.blocks\.1\.mlp\.dictionary")
    refused({**weights, "transformer.h.1.extra": torch.zeros(1)}, "unknown .*extra")
    (tmp_path / "text.pt").write_text("hello world")
    with pytest.raises(ModelError, match="by its first bytes"):
        import_released(tmp_path / "text.pt", tmp_path / "model")
    with pytest.raises(ModelError, match="no such checkpoint"):
        import_released(tmp_path / "absent.pt", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_existing_folder_is_left_alone(shared, tmp_path):
    weights, _ = released(shared, "crate_reference_2l")
    torch.save(checkpoint(weights), tmp_path / "ckpt.pt")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(ModelError, match="something is there already"):
        import_released(tmp_path / "ckpt.pt", tmp_path / "model")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["mine.txt"]


def test_heads_that_do_not_fit_the_width_are_refused(shared, tmp_path):
    weights, _ = released(shared, "crate_reference_2l")
    torch.save(checkpoint(weights), tmp_path / "ckpt.pt")
    with pytest.raises(ModelError, match="n_heads that divides"):
        import_released(tmp_path / "ckpt.pt", tmp_path / "model", n_heads=5)

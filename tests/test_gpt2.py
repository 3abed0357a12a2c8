"""The GPT-2 baseline: what is set apart from transformers' defaults, and released weights."""

import errno
import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lmmono.errors import ModelError, RunError
from lmmono.models.build import build_model, model_config
from lmmono.models.gpt2 import from_released
from lmmono.models.hooks import run_with_cache
from lmmono.models.storage import load_model, save_model
from lmmono.recipe.sections import CrateModel, Gpt2Model


def small(activation: str = "relu"):
    section = Gpt2Model(arch="gpt2", n_layers=2, d_model=16, n_heads=2, activation=activation)
    return build_model(section, d_vocab=50, n_ctx=32, seed=0, eos_token_id=3)


def released_weights(biases: bool) -> dict[str, torch.Tensor]:
    """Return random weights under nanoGPT's names: linear layers [out, in]."""
    shapes = {"wte.weight": (50, 16), "wpe.weight": (32, 16), "ln_f.weight": (16,)}
    for norm in ("ln_1", "ln_2"):
        shapes[f"h.0.{norm}.weight"] = (16,)
    for name, shape in {
        "attn.c_attn": (48, 16),
        "attn.c_proj": (16, 16),
        "mlp.c_fc": (64, 16),
        "mlp.c_proj": (16, 64),
    }.items():
        shapes[f"h.0.{name}.weight"] = shape
    if biases:
        shapes |= {
            k.replace("weight", "bias"): v[:1] for k, v in shapes.items() if "w" not in k[:3]
        }
    torch.manual_seed(0)
    return {f"transformer.{name}": torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("gelu_new", "tanh")])
def test_neurons_are_the_activation_of_what_goes_in(name, function):
    model = small(name)
    _, acts = run_with_cache(model, torch.arange(8), "blocks.1.mlp.*")
    before, after = acts["blocks.1.mlp.hook_pre"], acts["blocks.1.mlp.hook_post"]
    wanted = F.gelu(before, approximate="tanh") if function == "tanh" else function(before)
    torch.testing.assert_close(after, wanted)


def test_nothing_is_dropped_in_training():
    model, tokens = small(), torch.arange(8)[None]
    assert torch.equal(model.train()(tokens).logits, model.eval()(tokens).logits)


def test_a_plain_forward_makes_no_cache_and_generation_does(tmp_path):
    model, tokens = small(), torch.arange(4, 8)[None]
    for each in (model, load_model(save_model(model, tmp_path / "model"))):
        assert each(tokens).past_key_values is None
        out = each.generate(
            tokens, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True
        )
        assert out.past_key_values.get_seq_length() == 6


def test_the_first_loss_prints_no_warning(tmp_path, caplog):
    model, tokens = small(), torch.arange(8)[None]
    again = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(model(tokens, labels=tokens).loss, again(tokens, labels=tokens).loss)
    assert not caplog.records


def test_released_weights_without_biases_get_zero_ones():
    weights = released_weights(biases=False)
    model = from_released(weights, n_heads=2)
    state = model.state_dict()
    assert all(not v.any() for k, v in state.items() if k.endswith(".bias"))
    fc = weights["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(state["transformer.h.0.mlp.c_fc.weight"], fc.T)


def test_a_released_checkpoint_that_lost_one_bias_is_refused():
    weights = released_weights(biases=True)
    from_released(weights, n_heads=2)
    del weights["transformer.h.0.mlp.c_fc.bias"]
    with pytest.raises(ModelError, match=r"missing transformer\.h\.0\.mlp\.c_fc\.bias"):
        from_released(weights, n_heads=2)


def test_a_weight_of_another_shape_is_named_with_both_shapes():
    weights = released_weights(biases=False)
    weights["transformer.h.0.mlp.c_fc.weight"] = torch.randn(60, 16)
    with pytest.raises(ModelError, match=r"c_fc\.weight has shape \[16, 60\], want \[16, 64\]"):
        from_released(weights, n_heads=2)


@pytest.mark.parametrize("section", [CrateModel(arch="crate"), Gpt2Model(arch="gpt2")])
def test_a_section_becomes_a_model_of_its_sizes(section):
    config = model_config(section, d_vocab=77, n_ctx=19, eos_token_id=5)
    assert (config.vocab_size, config.max_position_embeddings) == (77, 19)
    assert (config.num_hidden_layers, config.hidden_size) == (2, 128)
    assert (config.num_attention_heads, config.eos_token_id) == (4, 5)


def test_weights_depend_on_the_seed_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = small().state_dict(), small().state_dict()
    assert all(a[k].equal(b[k]) for k in a)


def test_a_folder_without_a_model_says_what_makes_one(tmp_path):
    with pytest.raises(ModelError, match="no model here"):
        load_model(tmp_path / "absent")
    (tmp_path / "config.json").write_text('{"model_type": "crate"}')
    with pytest.raises(ModelError, match="not a model lmmono can read"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(ModelError, match="not a model lmmono can read"):
        load_model(tmp_path)


def test_a_truncated_or_foreign_weights_file_is_named_with_its_size(tmp_path):
    folder = save_model(small(), tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for broken in (whole[:1000], whole[:-1], whole[:4], b""):
        weights.write_bytes(broken)
        with pytest.raises(ModelError, match=f"got {len(broken):,} bytes that are no whole"):
            load_model(folder)
    weights.write_bytes(whole)
    load_model(folder)


CODE = """from pathlib import Path
Path("ran").touch()
from transformers import GPT2Config, GPT2LMHeadModel
class Config(GPT2Config): model_type = "foreign"
class Model(GPT2LMHeadModel): config_class = Config
"""


def test_the_code_of_a_model_folder_runs_only_where_that_is_allowed(tmp_path, monkeypatch):
    folder = save_model(small(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config |= {"model_type": "foreign", "auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers would ask
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ModelError, match="(?s)not a model lmmono can read.*trust_remote_code"):
        load_model(folder)
    assert not Path("ran").exists()


def test_a_config_that_asks_for_other_weights_is_refused(tmp_path):
    folder = save_model(small(), tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    with pytest.raises(ModelError, match=r"transformer\.h\.2\S+ is missing"):
        load_model(folder)
    config.write_text(config.read_text().replace('"n_layer": 3', '"n_layer": 1'))
    with pytest.raises(ModelError, match=r"transformer\.h\.1\S+ is unknown"):
        load_model(folder)


@pytest.mark.parametrize(
    ("value", "dtype"), [(torch.nan, "auto"), (torch.inf, "auto"), (1e6, "float16")]
)
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, dtype):
    model = small()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = value
    folder = save_model(model, tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"NaN or infinite numbers in transformer\.h\.1\.mlp\.c_fc"
    ):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("arch", "setting", "value"),
    [
        ("crate", "sparsity", "x"),
        ("crate", "step_size", []),
        ("crate", "num_attention_heads", -1),
        ("crate", "layer_norm_eps", -1),
        ("gpt2", "layer_norm_epsilon", -1),
        ("gpt2", "activation_function", "none"),
    ],
)
def test_a_config_that_loads_and_cannot_run_is_refused(tmp_path, arch, setting, value):
    section = CrateModel(arch="crate") if arch == "crate" else Gpt2Model(arch="gpt2")
    model = build_model(section, d_vocab=30, n_ctx=8, eos_token_id=0, seed=0)
    folder = save_model(model, tmp_path / "model")
    load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {setting: value}))
    with pytest.raises(ModelError, match=f"{folder}: (not a model lmmono can read|the logits)"):
        load_model(folder)


def test_a_full_disk_leaves_no_part_of_a_model(tmp_path, monkeypatch):
    def fill_up(folder: Path, **_: object) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    model = small()
    monkeypatch.setattr(model, "save_pretrained", fill_up)
    with pytest.raises(RunError, match="cannot be written: No space left on device; free some"):
        save_model(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_is_never_saved_over_something(tmp_path):
    save_model(small(), tmp_path / "model")
    with pytest.raises(ModelError, match="something is there already"):
        save_model(small(), tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

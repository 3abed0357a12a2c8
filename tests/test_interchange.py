"""Dictionaries of other tools: their own code reads ours, ours reads theirs, with equal outputs."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lmmono as lm
from lmmono.dictionaries.architectures import sae_lens, training_sae
from lmmono.dictionaries.estimator import verify_dictionary
from lmmono.errors import DictionaryError
from lmmono.interop.interchange import Imported, export_dictionary, import_dictionary

D_IN, D_SAE, HOOK = 12, 40, "blocks.1.hook_resid_post"
CLOSE = {"rtol": 1e-6, "atol": 1e-6}

SETTINGS: dict[str, dict[str, Any]] = {
    "standard": {"coefficient": 0.1},
    "gated": {"coefficient": 0.1},
    "topk": {"k": 4},
    "batchtopk": {"k": 4},
    "jumprelu": {"target_l0": 4.0},
    "matryoshka_batchtopk": {"k": 4, "widths": (10, 20)},
    "matching_pursuit": {"k": 4},
}


def some_vectors(n: int = 64) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(5))


def shaken(network: Any) -> Any:
    """Move all weights away from their start, so that no bias or threshold is zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = 0.3 * torch.randn(weight.shape, generator=generator)
            weight.add_(noise.abs() if "threshold" in name else noise)
    return network


def theirs(arch: str, folder: Path) -> Any:
    """Write an SAE with sae-lens alone and return it as sae-lens reads it."""
    settings = lm.SAE(arch, d_sae=D_SAE, **SETTINGS[arch]).settings
    training = training_sae(settings, D_IN, D_SAE, 3, {"hook_name": HOOK, "model_name": "tiny"})
    shaken(training).save_inference_model(folder)
    return sae_lens().SAE.load_from_disk(folder)


def test_a_dictionary_of_others_whose_weights_are_no_numbers_is_refused(tmp_path: Path) -> None:
    theirs("topk", tmp_path / "sae")
    path = tmp_path / "sae" / "sae_weights.safetensors"
    weights = load_file(path)
    weights["W_dec"][0, 0] = torch.nan
    save_file({name: weight.clone() for name, weight in weights.items()}, path)
    with pytest.raises(DictionaryError, match="NaN or infinite numbers in W_dec"):
        import_dictionary(tmp_path / "sae", format="sae_lens")


@pytest.fixture(scope="module", params=SETTINGS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_same(dictionary: lm.dictionaries.Dictionary, network: Any) -> None:
    """Compare codes and reconstructions with those of a sae-lens SAE."""
    x = some_vectors()
    with torch.no_grad():
        acts = network.encode(x)
        assert (acts != 0).any()
        torch.testing.assert_close(dictionary.encode(x), acts, **CLOSE)
        torch.testing.assert_close(dictionary.decode(acts), network.decode(acts), **CLOSE)


def test_we_read_what_sae_lens_writes_and_sae_lens_reads_what_we_write(
    arch: str, tmp_path: Path
) -> None:
    network = theirs(arch, tmp_path / "theirs")
    ours = import_dictionary(tmp_path / "theirs")
    assert isinstance(ours, Imported) and ours.hook == HOOK
    assert (ours.d_in, ours.d_sae) == (D_IN, D_SAE)
    assert_same(ours, network)
    export_dictionary(ours, tmp_path / "again")
    again = sae_lens().SAE.load_from_disk(tmp_path / "again")
    assert type(again) is type(network)
    assert_same(ours, again)
    assert again.cfg.metadata.model_name == "tiny"
    ours.save(tmp_path / "kept")
    kept = lm.load_dictionary(tmp_path / "kept")
    assert kept.digest == ours.digest and kept.hook == HOOK
    assert_same(kept, network)


def test_sae_lens_reads_the_saes_that_we_train(arch: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, D_IN, generator=generator)
    x = torch.randn(2048, 4, generator=generator).relu() @ directions
    sae = lm.SAE(arch, d_sae=D_SAE, steps=100, lr=1e-2, dead_window_steps=1000, **SETTINGS[arch])
    sae.fit(x)
    sae.hook = HOOK
    export_dictionary(sae, tmp_path / "out")
    assert_same(sae, sae_lens().SAE.load_from_disk(tmp_path / "out"))
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == HOOK
    assert not (tmp_path / "out" / "dictionary.json").exists()


def test_the_dense_control_is_a_standard_sae_to_sae_lens(tmp_path: Path) -> None:
    dense = lm.Control("dense", d_sae=16, steps=60, lr=1e-2).fit(some_vectors(512))
    export_dictionary(dense, tmp_path / "out")
    network = sae_lens().SAE.load_from_disk(tmp_path / "out")
    assert network.cfg.architecture() == "standard"
    assert_same(dense, network)


def test_heads_are_flattened_and_low_precision_is_widened(tmp_path: Path) -> None:
    theirs("topk", tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config |= {"reshape_activations": "hook_z", "dtype": "bfloat16"}
    config["metadata"]["hook_name"] = "blocks.0.attn.hook_z"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    ours = import_dictionary(tmp_path)
    assert ours.encode(some_vectors()).dtype == torch.float32
    network = sae_lens().SAE.load_from_disk(tmp_path).to(dtype=torch.float32)
    heads = some_vectors().reshape(-1, 3, D_IN // 3)
    with torch.no_grad():
        wanted = network.decode(network.encode(heads)).flatten(1)
    torch.testing.assert_close(ours.reconstruct(some_vectors()), wanted, **CLOSE)


def sparsify_forward(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and reconstructions by the formulas of sparsify's `SparseCoder`."""
    w, k = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())["k"]
    pre = torch.relu((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    best = pre.topk(k)
    acts = torch.zeros_like(pre).scatter(1, best.indices, best.values)
    return acts, acts @ w["W_dec"] + w["b_dec"]


def sparsify_folder(folder: Path, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(1)
    shapes = {"W_dec": (D_SAE, D_IN), "b_dec": (D_IN,), "encoder.bias": (D_SAE,)}
    shapes["encoder.weight"] = (D_SAE, D_IN)
    folder.mkdir()
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, folder / "sae.safetensors")
    cfg = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": 5}
    cfg |= {"transcode": False, "skip_connection": False, "d_in": D_IN}
    (folder / "cfg.json").write_text(json.dumps(cfg | config))
    return folder


def test_sparse_coders_of_sparsify_are_read_and_written(tmp_path: Path) -> None:
    x = some_vectors()
    acts, recons = sparsify_forward(sparsify_folder(tmp_path / "theirs"), x)
    ours = import_dictionary(tmp_path / "theirs", hook=HOOK)
    torch.testing.assert_close(ours.encode(x), acts, **CLOSE)
    torch.testing.assert_close(ours.reconstruct(x), recons, **CLOSE)
    export_dictionary(ours, tmp_path / "again", to="sparsify")
    before, after = (load_file(tmp_path / f / "sae.safetensors") for f in ("theirs", "again"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sparsify_forward(tmp_path / "again", x)[1].equal(recons)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_decoder_norms_and_biases_are_folded_for_sparsify(
    apply_b_dec: bool, tmp_path: Path
) -> None:
    network = theirs("topk", tmp_path / "a")
    assert network.cfg.rescale_acts_by_decoder_norm
    network.cfg.apply_b_dec_to_input = apply_b_dec
    network.save_model(tmp_path / "b")
    export_dictionary(import_dictionary(tmp_path / "b"), tmp_path / "out", to="sparsify")
    x = some_vectors()
    with torch.no_grad():
        acts, recons = sparsify_forward(tmp_path / "out", x)
        torch.testing.assert_close(acts, network.encode(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(recons, network(x), rtol=1e-5, atol=1e-5)


def test_sparsify_itself_agrees(tmp_path: Path) -> None:
    module = pytest.importorskip(
        "sparsify.sparse_coder", reason="eai-sparsify is not among the test packages"
    )
    x = some_vectors()
    coder = module.SparseCoder.load_from_disk(sparsify_folder(tmp_path / "theirs"))
    ours = import_dictionary(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours.reconstruct(x), coder(x).sae_out, rtol=1e-5, atol=1e-5)
    theirs("topk", tmp_path / "lens")
    sae = import_dictionary(tmp_path / "lens")
    export_dictionary(sae, tmp_path / "out", to="sparsify")
    coder = module.SparseCoder.load_from_disk(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(sae.reconstruct(x), coder(x).sae_out, rtol=1e-5, atol=1e-5)


def dictionary_learning_weights(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    linear = {"encoder.weight": draw(D_SAE, D_IN), "decoder.weight": draw(D_IN, D_SAE)}
    biased = {**linear, "encoder.bias": draw(D_SAE)}
    plain = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, D_IN)}
    plain["b_dec"] = draw(D_IN)
    k, one = {"k": torch.tensor(4, dtype=torch.int)}, {"threshold": torch.tensor(0.7)}
    gates = {name: draw(D_SAE) for name in ("r_mag", "gate_bias", "mag_bias")}
    return {
        "AutoEncoder": {**biased, "bias": draw(D_IN)},
        "AutoEncoderNew": {**biased, "decoder.bias": draw(D_IN)},
        "AutoEncoderTopK": {**biased, "b_dec": draw(D_IN), **k, **one},
        "BatchTopKSAE": {**biased, "b_dec": draw(D_IN), **k, **one},
        "MatryoshkaBatchTopKSAE": {**plain, **k, **one, "group_sizes": torch.tensor([10, 30])},
        "JumpReluAutoEncoder": {**plain, "threshold": draw(D_SAE).abs()},
        "GatedAutoEncoder": {**linear, "decoder_bias": draw(D_IN), **gates},
    }[name]


def dictionary_learning_forward(name: str, w: dict[str, Tensor], x: Tensor) -> tuple[Any, Any]:
    """Return codes and reconstructions by the formulas of dictionary_learning 0.1.0."""
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        pre = (x - w["b_dec"] if name[0] == "M" else x) @ w["W_enc"] + w["b_enc"]
        acts = pre.relu() * (pre > w["threshold"])
        return acts, acts @ w["W_dec"] + w["b_dec"]
    names = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}
    bias = w[names.get(name, "decoder.bias" if name[-3:] == "New" else "b_dec")]
    pre = (x if name == "AutoEncoderNew" else x - bias) @ w["encoder.weight"].T
    decoder = w["decoder.weight"]
    if name == "GatedAutoEncoder":
        acts = (pre + w["gate_bias"] > 0) * (w["r_mag"].exp() * pre + w["mag_bias"]).relu()
    else:
        acts = (pre + w["encoder.bias"]).relu()
    if name == "AutoEncoder":
        acts, decoder = acts * decoder.norm(dim=0), decoder / decoder.norm(dim=0)
    if name == "AutoEncoderTopK":
        best = acts.topk(int(w["k"]))
        acts = torch.zeros_like(acts).scatter(1, best.indices, best.values)
    if name == "BatchTopKSAE":
        acts = acts * (acts > 0.7)
    return acts, acts @ decoder.T + bias


CLASSES = ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"]
CLASSES += ["MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder", "GatedAutoEncoder"]


def dictionary_learning_folder(folder: Path, name: str) -> Path:
    folder.mkdir()
    torch.save(dictionary_learning_weights(name), folder / "ae.pt")
    config = {"trainer": {"dict_class": name, "k": 4}, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_dictionaries_of_dictionary_learning_are_read(name: str, tmp_path: Path) -> None:
    x = some_vectors()
    folder = dictionary_learning_folder(tmp_path / "theirs", name)
    ours = import_dictionary(folder / "ae.pt", hook=HOOK)
    acts, recons = dictionary_learning_forward(name, dictionary_learning_weights(name), x)
    torch.testing.assert_close(ours.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), recons, rtol=1e-5, atol=1e-5)
    export_dictionary(ours, tmp_path / "out")
    assert_same(ours, sae_lens().SAE.load_from_disk(tmp_path / "out"))


WRITTEN = ["AutoEncoderNew", "AutoEncoderTopK", "JumpReluAutoEncoder", "GatedAutoEncoder"]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_dictionary_learning_wrote_goes_back_as_it_was(name: str, tmp_path: Path) -> None:
    ours = import_dictionary(dictionary_learning_folder(tmp_path / "theirs", name), hook=HOOK)
    out = export_dictionary(ours, tmp_path / "out", to="dictionary_learning")
    before, after = dictionary_learning_weights(name), torch.load(out / "ae.pt", weights_only=True)
    before |= {"threshold": torch.tensor(-1.0)} if name == "AutoEncoderTopK" else {}
    assert before.keys() == after.keys()
    for key, weight in before.items():
        torch.testing.assert_close(after[key], weight, rtol=1e-5, atol=1e-5)
    trainer = json.loads((out / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == name and trainer["submodule_name"] == HOOK
    assert trainer.get("k") == (4 if name == "AutoEncoderTopK" else None)


@pytest.mark.parametrize("kind", ["standard", "gated", "topk", "batchtopk", "jumprelu"])
def test_dictionary_learning_codes_as_the_saes_that_we_give_it(kind: str, tmp_path: Path) -> None:
    theirs(kind, tmp_path / "lens")
    ours = import_dictionary(tmp_path / "lens")
    out = export_dictionary(ours, tmp_path / "out", to="dictionary_learning")
    name = json.loads((out / "config.json").read_text())["trainer"]["dict_class"]
    weights, x = torch.load(out / "ae.pt", weights_only=True), some_vectors()
    acts, recons = dictionary_learning_forward(name, weights, x)
    torch.testing.assert_close(acts, ours.encode(x), **CLOSE)
    torch.testing.assert_close(recons, ours.reconstruct(x), **CLOSE)
    assert (acts != 0).any()


class Code:
    """What a pickle could run."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("code ran",))


def test_a_pickle_that_holds_more_than_tensors_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = dictionary_learning_folder(tmp_path / "theirs", "AutoEncoder")
    for save in (torch.save, lambda code, path: path.write_bytes(pickle.dumps(code))):
        save({"bias": Code()}, folder / "ae.pt")
        with pytest.raises(
            DictionaryError,
            match="holds more than tensors.*Unsupported (global: GLOBAL print|operand)",
        ):
            import_dictionary(folder)
    assert "code ran" not in capsys.readouterr().out


def test_what_a_layout_cannot_carry_is_refused(tmp_path: Path) -> None:
    theirs("jumprelu", tmp_path / "jump")
    with pytest.raises(DictionaryError, match="k largest latents.*jumprelu.*sae_lens"):
        export_dictionary(import_dictionary(tmp_path / "jump"), tmp_path / "out", to="sparsify")
    theirs("matching_pursuit", tmp_path / "pursuit")
    with pytest.raises(DictionaryError, match="no class for a matching_pursuit SAE"):
        pursuit = import_dictionary(tmp_path / "pursuit")
        export_dictionary(pursuit, tmp_path / "out2", to="dictionary_learning")
    identity = lm.Control("raw").fit(some_vectors())
    with pytest.raises(DictionaryError, match="no architecture for a raw dictionary"):
        export_dictionary(identity, tmp_path / "out")
    with pytest.raises(DictionaryError, match="not fitted"):
        export_dictionary(lm.SAE("topk", d_sae=8, k=2), tmp_path / "out")
    with pytest.raises(DictionaryError, match="holds something already"):
        export_dictionary(import_dictionary(tmp_path / "jump"), tmp_path / "jump")
    with pytest.raises(DictionaryError, match="imported and stays as it is"):
        import_dictionary(tmp_path / "jump").fit(some_vectors())


def edit(folder: Path, name: str, **changes: Any) -> None:
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | changes))


def test_foreign_and_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    lens, sparse = tmp_path / "lens", sparsify_folder(tmp_path / "sparse")
    theirs("topk", lens)
    learned = dictionary_learning_folder(tmp_path / "learned", "AutoEncoder")

    def refused(folder: Path, message: str, **options: Any) -> None:
        with pytest.raises(DictionaryError, match=message):
            import_dictionary(folder, **options)

    refused(tmp_path, "no layout that is known; it has learned/, lens/, sparse/, want lmmono: ")
    refused(tmp_path / "nowhere", "no such folder")
    refused(sparse, "as sae_lens it wants sae_weights.safetensors", format="sae_lens")
    for changes, message in (
        ({"transcode": True}, "transcode = True"),
        ({"activation": "groupmax"}, "activation = 'groupmax'"),
        ({"transcode": False, "activation": "topk", "k": None}, "want k, a number >= 1, got None"),
    ):
        edit(sparse, "cfg.json", **changes)
        refused(sparse, message)
    edit(sparse, "cfg.json", k=3)
    whole = (sparse / "sae.safetensors").read_bytes()
    (sparse / "sae.safetensors").write_bytes(whole[:-9])
    refused(sparse, "no whole safetensors file")
    save_file({"W_dec": torch.zeros(3, 2)}, sparse / "sae.safetensors")
    refused(sparse, "got tensors W_dec; want W_dec, b_dec, encoder.bias, encoder.weight")
    edit(lens, "cfg.json", normalize_activations="layer_norm")
    refused(lens, "rescales every vector by its own size")
    edit(lens, "cfg.json", normalize_activations="none", architecture="batchtopk")
    refused(lens, "architecture 'batchtopk' is no dictionary.*topk")
    edit(lens, "cfg.json", architecture="topk", d_in=7)
    refused(lens, "size mismatch")
    (lens / "cfg.json").write_text("[1]")
    refused(lens, "damaged: Input should be an object, got a list")
    edit(learned, "config.json", trainer={"dict_class": "GatedAutoEncoder"})
    refused(learned, "got tensors bias, .*; want decoder.weight, decoder_bias")
    edit(learned, "config.json", trainer={"dict_class": "CrossCoder"})
    refused(learned, "dict_class 'CrossCoder' is not known; .*AutoEncoder")
    (learned / "config.json").write_text("{")
    refused(learned, "damaged")


def unfolded(folder: Path) -> Any:
    """Write an SAE whose input was scaled in training, the scale not folded; return it."""
    cls, config = sae_lens().registry.get_sae_class("standard")
    network = cls(config(d_in=D_IN, d_sae=D_SAE, normalize_activations="expected_average_only_in"))
    shaken(network).save_model(folder)
    return network


def test_a_scale_that_was_never_folded_is_asked_for_and_folded(tmp_path: Path) -> None:
    network, x = unfolded(tmp_path / "scaled"), some_vectors()
    with pytest.raises(DictionaryError, match=r"expected_average_only_in.*scale=.*1\.0 if"):
        import_dictionary(tmp_path / "scaled")
    sae = import_dictionary(tmp_path / "scaled", scale=0.37)
    torch.testing.assert_close(sae.encode(x), network.encode(0.37 * x), **CLOSE)
    torch.testing.assert_close(sae.reconstruct(x), network(0.37 * x) / 0.37, rtol=1e-5, atol=1e-5)
    again = lm.load_dictionary(sae.save(tmp_path / "ours"))  # says now that nothing is to be scaled
    assert torch.equal(again.encode(x), sae.encode(x))
    as_it_is = import_dictionary(tmp_path / "scaled", scale=1.0)
    torch.testing.assert_close(as_it_is.encode(x), network.encode(x), **CLOSE)
    with pytest.raises(DictionaryError, match="want a positive number, got -1"):
        import_dictionary(tmp_path / "scaled", scale=-1.0)
    theirs("standard", tmp_path / "plain")
    with pytest.raises(DictionaryError, match="scale: want none, got 2"):
        import_dictionary(tmp_path / "plain", scale=2.0)


@pytest.mark.parametrize("spare", [(), ("threshold",), ("k",), ("k", "threshold")])
def test_an_older_topk_layout_needs_no_buffers_that_it_does_not_use(spare, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"encoder.weight": torch.randn(16, 8), "encoder.bias": torch.randn(16)}
    weights |= {"decoder.weight": torch.randn(8, 16), "b_dec": torch.randn(8)}
    buffers = {"k": torch.tensor(3), "threshold": torch.tensor(-1.0)}
    torch.save(weights | {name: buffers[name] for name in spare}, tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoderTopK", "k": 3}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    x = torch.randn(5, 8)
    pre = (x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"]
    top = pre.relu().topk(3)
    want = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    torch.testing.assert_close(import_dictionary(tmp_path).encode(x), want, rtol=1e-5, atol=1e-5)


def test_damaged_bytes_of_any_file_are_found_when_a_dictionary_is_loaded(tmp_path: Path) -> None:
    """One bit anywhere in the weights, a file that is gone, an index that says other sizes."""
    x = some_vectors()
    saved = [
        lm.Classical("pca", d_sae=4).fit(x).save(tmp_path / "pca"),
        lm.SAE("topk", d_sae=16, k=3, steps=20, lr=0.01).fit(x).save(tmp_path / "sae"),
    ]
    for folder in saved:
        assert verify_dictionary(folder) == []
        index = folder / "dictionary.json"
        names = json.loads(index.read_text())["sha256"]
        assert names and set(names) <= {path.name for path in folder.iterdir()}
        for name in names:
            whole = (folder / name).read_bytes()
            for place in (0, len(whole) // 2, len(whole) - 1):
                broken = bytearray(whole)
                broken[place] ^= 1
                (folder / name).write_bytes(broken)
                with pytest.raises(DictionaryError, match=f"{name}.*sha256 differs"):
                    lm.load_dictionary(folder)
                assert len(verify_dictionary(folder)) == 1
            (folder / name).unlink()
            with pytest.raises(DictionaryError, match=f"{name}: missing"):
                lm.load_dictionary(folder)
            (folder / name).write_bytes(whole)
        whole = json.loads(index.read_text())
        odd: list[Any] = [
            [],
            3,
            whole | {"kind": "sea"},
            whole | {"kind": []},
            whole | {"d_in": whole["d_in"] + 1},
            whole | {"settings": 7},
            whole | {"settings": {"arch": "x"}},
            whole | {"facts": None},
            {k: v for k, v in whole.items() if k != "seed"},
        ]
        for content in (*map(json.dumps, odd), "[" * 99_999, '{"format": ' + "9" * 9_999, "\x00"):
            index.write_text(content)
            with pytest.raises(DictionaryError, match="dictionary.json|arch"):
                lm.load_dictionary(folder)
        index.write_text(json.dumps(whole))
        lm.load_dictionary(folder)


def test_a_dictionary_from_before_digests_says_so_and_its_weights_can_be_taken(tmp_path) -> None:
    x = some_vectors()
    pca = lm.Classical("pca", d_sae=4).fit(x).save(tmp_path / "pca")
    sae = lm.SAE("topk", d_sae=16, k=3, steps=20, lr=0.01).fit(x)
    folder = sae.save(tmp_path / "sae")
    for each in (pca, folder):
        whole = json.loads((each / "dictionary.json").read_text())
        del whole["sha256"]
        (each / "dictionary.json").write_text(json.dumps(whole))
    with pytest.raises(DictionaryError, match=r"no sha256 of its weights.*fit it again$"):
        lm.load_dictionary(pca)
    with pytest.raises(DictionaryError, match=r"no sha256.*fit it again, or take.*\(") as told:
        lm.load_dictionary(folder)
    way_out = str(told.value).rpartition("as they are: ")[2]
    taken = eval(way_out, {"lm": lm})  # what the message says to type
    torch.testing.assert_close(taken.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)

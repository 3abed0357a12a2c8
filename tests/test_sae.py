"""SAEs: sae-lens trains them, the scale is in the weights, seeds give bits, faults speak."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import activation_store as astore
import lmmono as lm
from lmmono.dictionaries.architectures import read_inference, sae_lens, trainer, training_sae
from lmmono.dictionaries.sae_training import read_first_batches
from lmmono.dictionaries.sparse import Scratch, SparseStep
from lmmono.dictionaries.vector_source import ArrayVectors
from lmmono.errors import DictionaryError

D_IN, D_SAE, STEPS = 12, 32, 80
ARCHS: dict[str, dict[str, Any]] = {
    "standard": {"coefficient": 0.5, "coefficient_warmup_steps": 20},
    "gated": {"coefficient": 0.5},
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "jumprelu": {"target_l0": 3.0},
    "matryoshka_batchtopk": {"k": 3, "widths": (8, 16)},
    "matching_pursuit": {"k": 3},
}
SPARSE = ("topk", "batchtopk")


def planted(n: int = 1000, seed: int = 0) -> torch.Tensor:
    """Sparse sums of known directions, far from the origin and far from unit norm."""
    made = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(24, D_IN, generator=made), dim=-1)
    code = torch.rand(n, 24, generator=made) * (torch.rand(n, 24, generator=made) < 0.1)
    return 5.0 * code @ directions + 2.0


def vectors(n: int = 1000) -> ArrayVectors:
    return ArrayVectors(planted(n), batch_tokens=128)  # 1000 = 7 batches of 128 and one of 104


def make(arch: str, **settings: Any) -> lm.SAE:
    given = {"d_sae": D_SAE, "steps": STEPS, "lr": 1e-2, "seed": 3, **ARCHS[arch], **settings}
    return lm.SAE(arch, **given)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_weights_are_those_of_sae_lens_own_loop_to_the_bit(arch: str, tmp_path: Path) -> None:
    own = {"sparse_step": False} if arch in SPARSE else {}
    ours = make(arch, warmup_steps=10, **own).fit(vectors())
    scale = read_first_batches(vectors()).scales[""]
    theirs = training_sae(ours.settings, D_IN, D_SAE, 3, {})
    loop = trainer(ours.settings, theirs, 128)
    loop.data_provider = (batch[""] for batch in vectors().batches())
    loop.activation_scaler.scaling_factor = scale
    loop.cfg.total_training_samples = ours.facts["n_tokens"]  # the last batch of an epoch is short
    loop.fit().save_inference_model(tmp_path)
    want = read_inference(tmp_path).state_dict()
    assert ours.tensors().keys() == want.keys()
    for name, tensor in ours.tensors().items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("arch", SPARSE)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("d_sae", "window"), [(32, 500), (8, 5), (200, 2)])
def test_the_sparse_step_is_that_of_sae_lens_to_rounding(
    arch: str, threads: int, d_sae: int, window: int
) -> None:
    """60 steps, with no, few (all in the loss for dead latents) and many dead latents."""
    settings = make(arch, lr=1e-3, d_sae=d_sae, dead_window_steps=window).settings
    theirs, ours = (training_sae(settings, D_IN, d_sae, 3, {}) for _ in range(2))
    loop, made = trainer(settings, theirs, 128), trainer(settings, ours, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    step, n_dead = SparseStep(made, Scratch()), 0
    for number, batch in zip(range(60), vectors().batches(), strict=False):
        n_dead = max(n_dead, int(loop.dead_neurons.sum()))
        want = loop.step(batch[""])
        found = step.step(batch[""])
        loop.n_training_steps = made.n_training_steps = number + 1
        assert found.loss == pytest.approx(want.loss.item(), rel=1e-5)
        assert found.n_active == int(want.feature_acts.count_nonzero())
        error = (want.sae_in - want.sae_out).square().sum()
        assert found.squared_error == pytest.approx(error.item(), rel=1e-5)
    torch.set_num_threads(before)
    assert (n_dead == 0) == (window == 500)
    assert (n_dead > D_IN // 2) == (d_sae == 200)  # more than the loss for dead latents takes
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-5, msg=name)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(loop, name), getattr(made, name))
    assert loop.optimizer.param_groups[0]["lr"] == made.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_folded_scale_changes_nothing(arch: str, tmp_path: Path) -> None:
    """Folded on x gives what the unfolded SAE gives on scaled x, and the scaling is not trivial."""
    scaled_sae = training_sae(make(arch).settings, D_IN, D_SAE, 3, {})
    loop, x, scale = trainer(make(arch).settings, scaled_sae, 128), planted(), 0.37
    loop.activation_scaler.scaling_factor = scale
    for number, batch in zip(range(STEPS), vectors().batches(), strict=False):
        loop.step(batch[""])
        loop.n_training_steps = number + 1
    scaled_sae.save_inference_model(tmp_path / "scaled")
    scaled = read_inference(tmp_path / "scaled")
    scaled_sae.fold_activation_norm_scaling_factor(scale)
    scaled_sae.save_inference_model(tmp_path / "folded")
    folded = read_inference(tmp_path / "folded")
    acts, want = folded.encode(x), scaled.encode(scale * x)
    unit = scale if arch in {"topk", "batchtopk", "matryoshka_batchtopk", "matching_pursuit"} else 1
    close = (unit * acts - want).abs() <= 1e-5 * (1 + want.abs())
    assert close.float().mean() > 0.9999  # a pre-activation at its threshold may fall either way
    assert want.count_nonzero() > len(x)
    rows = close.all(-1)
    torch.testing.assert_close(
        folded.decode(acts)[rows], scaled.decode(want)[rows] / scale, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_the_folder_is_a_saelens_folder_and_loads_to_equal_bits(arch: str, tmp_path: Path) -> None:
    x = planted()
    found = ArrayVectors(x, batch_tokens=128, hook="blocks.0.hook_resid_post")
    found.facts = {"model_name": "tiny", "n_ctx": 64}
    sae = make(arch).fit(found)
    folder = sae.save(tmp_path / "sae")
    theirs = sae_lens().SAE.load_from_disk(folder)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs(x), sae.reconstruct(x), rtol=1e-6, atol=1e-6)
    trained_as = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == trained_as.get(arch, arch)
    assert config["metadata"]["hook_name"] == "blocks.0.hook_resid_post"
    assert (config["metadata"]["model_name"], config["metadata"]["context_size"]) == ("tiny", 64)
    assert config["metadata"]["training_architecture"] == arch
    loaded = lm.load_dictionary(folder)
    assert isinstance(loaded, lm.SAE)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(loaded.reconstruct(x), sae.reconstruct(x))
    assert (loaded.digest, loaded.facts, loaded.seed) == (sae.digest, sae.facts, sae.seed)
    assert loaded.history is not None and loaded.history.equals(sae.history)


def test_a_loaded_dictionary_can_be_saved_over_its_own_folder(tmp_path: Path) -> None:
    folder = make("topk").fit(vectors()).save(tmp_path)
    loaded = lm.load_dictionary(folder)
    digest = loaded.digest
    loaded.save(folder)
    assert loaded.digest == lm.load_dictionary(folder).digest == digest


def test_equal_seeds_give_equal_bits_and_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(1)
    first = make("batchtopk").fit(vectors())
    torch.manual_seed(2)
    torch.rand(7)
    before = torch.get_rng_state()
    second = make("batchtopk").fit(vectors())
    assert torch.equal(torch.get_rng_state(), before)
    assert first.digest == second.digest
    assert make("batchtopk", seed=4).fit(vectors()).digest != first.digest


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    sae = make("topk", steps=40, warmup_steps=10, decay_fraction=0.25, lr=0.1).fit(vectors())
    assert sae.history is not None
    rows = [row for row in sae.history.to_pylist() if row["metric"] == "lr"]
    after = {row["step"]: row["value"] for row in rows}  # the rate of the step that comes next
    want = {1: 0.02, 5: 0.06, 10: 0.1, 20: 0.1, 30: 0.1, 35: 0.05, 40: 0.0}
    assert {step: after[step] for step in want} == pytest.approx(want)


def test_the_curves_hold_the_numbers_of_the_batch_by_hand() -> None:
    """With next to no learning rate the last row is that of the dictionary we hold in the end."""
    x = planted(128)
    sae = make("topk", lr=1e-9, steps=200, scaling="none")
    seen: list[dict[str, float]] = []
    with pytest.raises(DictionaryError, match="FVU"):  # nothing was learned, and it says so
        sae.fit(ArrayVectors(x, batch_tokens=128), progress=lambda *_, **facts: seen.append(facts))
    fresh = training_sae(sae.settings, D_IN, D_SAE, 3, {})
    with torch.no_grad():
        acts = fresh.encode(x)
        error = (x - fresh(x)).numpy()
    variation = (x - x.mean(0)).numpy()
    assert seen[-1]["fvu"] == pytest.approx((error**2).sum() / (variation**2).sum(), rel=1e-4)
    assert seen[-1]["loss"] == pytest.approx((error**2).sum(1).mean(), rel=1e-4)
    assert seen[-1]["l0"] == pytest.approx(float(acts.count_nonzero()) / 128)
    assert seen[-1]["dead_fraction"] == pytest.approx(float((acts == 0).all(0).float().mean()))


def test_the_curves_are_a_file_and_a_table(tmp_path: Path) -> None:
    sae = make("topk").fit(vectors(), folder=tmp_path / "a")
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "a" / "metrics.parquet")
    assert table.equals(sae.history)
    columns = ["step", "metric", "metric_version", "value", "n_tokens", "seconds"]
    assert table.column_names == columns
    assert {"loss", "l0", "fvu", "dead_fraction", "lr"} == set(table["metric"].to_pylist())
    last = {row["metric"]: row["value"] for row in table.to_pylist()[-5:]}
    first = {row["metric"]: row["value"] for row in table.to_pylist()[:5]}
    assert last["loss"] < 0.5 * first["loss"]
    assert last["l0"] <= 3.0


@pytest.mark.parametrize(("arch", "reached"), [("topk", 3), ("batchtopk", 3), ("jumprelu", 3)])
def test_the_target_is_reached_and_reported(arch: str, reached: float) -> None:
    sae = make(arch, steps=300).fit(vectors())
    assert sae.facts["l0"] == pytest.approx(reached, rel=0.2)
    acts = sae.encode(planted())
    assert float((acts > 0).sum(-1).float().mean()) == pytest.approx(reached, rel=0.2)
    assert sae.facts["fvu"] < 0.5
    assert sae.facts["n_tokens"] == 37 * 1000 + 4 * 128


def broken(value: float) -> torch.Tensor:
    x = planted()
    x[17, 3] = value
    return x


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (broken(math.nan), {}, r"1 of 128 vectors of batch \d are NaN or infinite"),
        (broken(math.inf), {}, r"1 of 128 vectors of batch \d are NaN or infinite"),
        (planted(20), {}, "20 different vectors for 32 latents; want at least one per latent"),
        (planted(200), {"steps": 10**7}, r"times over the 200 vectors there are \(one epoch\)"),
        (torch.zeros(200, D_IN), {}, "the first 200 vectors are all zero"),
        (planted(), {"lr": 1e30}, "lower lr"),
        (planted(), {"lr": 1e-9}, r"worse than the mean vector; try more steps \(now 80\)"),
        (planted(), {"k": 33}, "k: want at most d_sae = 32, got 33"),
    ],
)
def test_a_fit_that_cannot_be_stops_and_leaves_the_dictionary_unfitted(
    data: torch.Tensor, settings: dict[str, Any], message: str
) -> None:
    sae = make("topk", **settings)
    with pytest.raises(DictionaryError, match=message):
        sae.fit(ArrayVectors(data, batch_tokens=128))
    assert sae.d_in == 0
    with pytest.raises(DictionaryError, match="not fitted"):
        sae.encode(planted())


def test_latents_that_all_die_are_told_with_the_coefficient_to_change() -> None:
    sae = make("standard", coefficient=1e4, steps=300)
    with pytest.raises(DictionaryError, match=r"all latents are dead.*smaller coefficient"):
        sae.fit(vectors())


def test_wrong_widths_are_told() -> None:
    sae = make("topk").fit(vectors())
    with pytest.raises(DictionaryError, match="width d_in = 12, got 11"):
        sae.encode(torch.zeros(2, 11))
    with pytest.raises(DictionaryError, match="growing widths below d_sae = 32"):
        make("matryoshka_batchtopk", widths=(16, 8)).fit(vectors())


def test_several_from_one_pass_are_those_fitted_alone() -> None:
    plans = {arch: {"steps": 40 + 10 * i} for i, arch in enumerate(ARCHS)}
    together = lm.dictionaries.fit_together({a: make(a, **s) for a, s in plans.items()}, vectors())
    for arch, settings in plans.items():
        assert together[arch].digest == make(arch, **settings).fit(vectors()).digest


def test_two_hooks_of_a_store_in_one_pass(tmp_path: Path) -> None:
    x = {"a": planted(160), "b": planted(160, seed=1)[:, :6]}
    hooks_kept = [astore.Vectors(hook, part.shape[1], "float32") for hook, part in x.items()]
    with (
        astore.open(tmp_path / "two", "w") as store,
        store.writer(vectors=hooks_kept, n_ctx=16) as writer,
    ):
        zeros = np.zeros((10, 16), np.int64)
        acts = {hook: part.reshape(10, 16, -1) for hook, part in x.items()}
        writer.add(np.arange(10), zeros, zeros, "train", acts)
    store = astore.open(tmp_path / "two")
    settings = {"d_sae": 16, "steps": 60, "k": 2, "lr": 1e-2}
    stream = store.vectors(["a", "b"], batch_tokens=64)
    made = {name: lm.SAE("topk", seed=0, **settings) for name in ("one", "two", "three")}
    hooks = {"one": "a", "two": "b", "three": "a"}
    both = lm.dictionaries.fit_together(made, stream, hooks=hooks)
    assert [both[name].hook for name in hooks] == ["a", "b", "a"]
    assert both["one"].digest == both["three"].digest
    assert [both[name].d_in for name in hooks] == [12, 6, 12]
    alone = lm.dictionaries.fit_together([lm.SAE("topk", seed=0, **settings)], stream, hooks=["b"])
    assert alone["0"].digest == both["two"].digest
    with pytest.raises(DictionaryError, match="want one hook, got a, b"):
        lm.SAE("topk", **settings).fit(stream)
    with pytest.raises(DictionaryError, match="'c' is none of the vectors'; known: a, b"):
        lm.dictionaries.fit_together([lm.SAE("topk", **settings)], stream, hooks=["c"])


def test_one_that_breaks_does_not_stop_the_others() -> None:
    good, bad = make("topk"), make("topk", lr=1e30)
    with pytest.raises(DictionaryError, match="bad: the loss became"):
        lm.dictionaries.fit_together({"bad": bad, "good": good}, vectors())
    assert bad.d_in == 0
    assert good.digest == make("topk").fit(vectors()).digest


def test_only_saes_are_fitted_together() -> None:
    pca: Any = lm.Classical("pca", d_sae=4)
    with pytest.raises(DictionaryError, match="pca: want an SAE, got Classical; fit other kinds"):
        lm.dictionaries.fit_together({"pca": pca}, vectors())
    sae = make("topk")
    with pytest.raises(DictionaryError, match="comes twice"):
        lm.dictionaries.fit_together([sae, sae], vectors())


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(DictionaryError, match="k"):
        lm.SAE("topk", d_sae=8)
    with pytest.raises(DictionaryError, match="d_sae or expansion"):
        lm.SAE("topk", k=2)
    with pytest.raises(DictionaryError, match="arch"):
        lm.SAE("topkk", d_sae=8, k=2)

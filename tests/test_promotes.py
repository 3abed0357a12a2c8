"""Table `promotes`: checked by hand from the weights, and with a unit that is planted in them."""

import numpy as np
import pytest
import torch
from small_models import small
from transformers import GPT2Config, GPT2LMHeadModel

import activation_store as astore
import lmmono as lm
from lmmono.scores.promotes import promotes

N_TOKENS = 40


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": N_TOKENS, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(**sizes, **ends, initializer_range=0.3, activation_function="relu")
    return GPT2LMHeadModel(config).eval()


def captured(model, path, hooks, vectors=()) -> astore.Store:
    ids = np.random.default_rng(0).integers(N_TOKENS, size=(8, 16)).astype(np.uint16)
    documents = np.arange(8, dtype=np.int32)[:, None].repeat(16, 1)
    tokens = lm.data.TokenRows(ids, documents, first_seq_id=0, split="val")
    with astore.open(path, "w") as store:
        store.add_vocabulary([f"t{i}" for i in range(model.config.vocab_size)])
        lm.capture(model, tokens, hooks=hooks, vectors=vectors, into=store, max_density=1.0)
    return astore.open(path, "a")


def rows(store, hook, unit, sign="up"):
    query = """SELECT token_id, logit, control FROM promotes
        WHERE hook = $hook AND unit = $unit AND sign = $sign ORDER BY rank"""
    return store.sql(query, hook=hook, unit=unit, sign=sign).fetchall()


def test_a_neuron_of_gpt2_promotes_what_its_weights_say(tmp_path):
    model, hook, unit = gpt2(), "blocks.0.mlp.hook_post", 5
    with torch.no_grad():
        # planted: the last norm takes off the mean and divides, so this is the unembedding of t7
        wanted = model.lm_head.weight[7]
        model.transformer.h[0].mlp.c_proj.weight[unit] = wanted - wanted.mean()
        model.transformer.ln_f.weight.uniform_(0.5, 1.5)
        model.transformer.ln_f.bias.normal_()
    with captured(model, tmp_path / "s", [hook]) as store:
        facts = promotes(store, model)
        assert facts == {"hooks": [hook], "left_out": {}}
        up, down = rows(store, hook, unit), rows(store, hook, unit, "down")
        other = rows(store, hook, 11)
    assert up[0][0] == 7 and len(up) == len(down) == 10
    for found, unit_ in ((up, unit), (other, 11)):  # by hand
        with torch.no_grad():
            row = model.transformer.h[0].mlp.c_proj.weight[unit_]
            row = row / row.square().mean().sqrt()
            centred = (row - row.mean()) / row.var(unbiased=False).sqrt()
            logits = model.lm_head.weight @ (centred * model.transformer.ln_f.weight)
            logits -= logits.mean()
        best = logits.topk(10)
        assert [token for token, *_ in found] == best.indices.tolist()
        assert np.allclose([logit for _, logit, _ in found], best.values, rtol=1e-3)
    assert [logit for _, logit, _ in down] == sorted(logit for _, logit, _ in down)
    assert up[0][1] > up[0][2] > 0, "the planted unit stands out from mixtures of units"


def test_a_neuron_of_crate_promotes_what_its_dictionary_row_says(tmp_path):
    model, hook = small(), "blocks.1.mlp.hook_post"
    with captured(model, tmp_path / "s", [hook]) as store:
        promotes(store, model)
        found = rows(store, hook, 3)
    with torch.no_grad():
        row = model.dictionaries()[1][3]
        normed = model.model.ln_final(row / row.square().mean().sqrt())
        logits = model.lm_head(normed) - model.lm_head(model.model.ln_final(torch.zeros(16)))
        logits -= logits.mean()
    best = logits.topk(10)
    assert [token for token, *_ in found] == best.indices.tolist()
    assert np.allclose([logit for _, logit, _ in found], best.values, rtol=1e-3)


def test_latents_are_read_through_their_decoder_and_what_has_no_direction_is_said(tmp_path):
    model, hook = gpt2(), "blocks.1.hook_resid_post"
    with captured(model, tmp_path / "s", ["blocks.1.attn.hook_z"], [hook]) as store:
        code = lm.Control(arch="random", d_sae=24, k=4, seed=0).fit(
            store.vectors(hook, batch_tokens=64)
        )
        code.save(tmp_path / "code")
        latents = lm.store_latents(store, code, halves=True)
        about = store.sql("FROM dictionaries").to_arrow_table().to_pylist()
        store.append("dictionaries", [{**about[0], "path": "code"}])
        facts = promotes(store, model, folder=tmp_path)
        found, negative = rows(store, latents, 2), rows(store, latents, 26, "down")
        again = promotes(store, model, [latents], folder=tmp_path)
        assert rows(store, latents, 2) == found and again["hooks"] == [latents]
    assert facts["hooks"] == [latents]
    assert "want mlp.hook_post or a hook of the stream" in facts["left_out"]["blocks.1.attn.hook_z"]
    with torch.no_grad():
        row = code.tensors()["W_dec"][2]
        logits = model.lm_head((row - row.mean()) / row.var(unbiased=False).sqrt())
        logits -= logits.mean()
    assert [token for token, *_ in found] == logits.topk(10).indices.tolist()
    assert negative[0][0] == found[0][0], "the other half of a signed code writes the opposite"


def test_the_nearest_units_are_those_of_the_largest_cosines(tmp_path):
    model, hook = gpt2(), "blocks.0.mlp.hook_post"
    with torch.no_grad():
        block = model.transformer.h[0].mlp
        block.c_proj.weight[9] = 3 * block.c_proj.weight[4]  # writes the same
        block.c_fc.weight[:, 21] = 2 * block.c_fc.weight[:, 4]  # and fires alike
        block.c_fc.bias[21] = 2 * block.c_fc.bias[4]
    with captured(model, tmp_path / "s", [hook]) as store:
        promotes(store, model)
        found = store.sql("FROM neighbours WHERE unit = 4 ORDER BY kind, rank").fetchall()
        rows = store.sql("SELECT unit, seq_id * 16 + pos, act FROM acts").fetchnumpy()
    acts = np.zeros((64, 8 * 16))
    acts[rows["unit"], [*rows.values()][1]] = rows["act"]
    weights = block.c_proj.weight.detach().numpy()
    for kind, vectors in (("coactivation", acts), ("weights", weights)):
        norms = np.linalg.norm(vectors, axis=1)
        cosines = vectors @ vectors[4] / norms / norms[4]
        best = [unit for unit in np.argsort(-cosines) if unit != 4][:10]
        mine = [row for row in found if row[2] == kind]
        assert [row[4] for row in mine] == best
        assert np.allclose([row[5] for row in mine], cosines[best], atol=2e-3)
    assert best[0] == 9 and found[0][4] == 21
    # independent units: means over root mean squares, checked on the first neighbour
    sizes = np.sqrt((acts**2).mean(1))
    chance = acts.mean(1)[4] * acts.mean(1)[21] / sizes[4] / sizes[21]
    assert found[0][6] == pytest.approx(chance, rel=1e-3) and found[0][6] < found[0][5]


@pytest.mark.parametrize("missing", ["path", "folder"])
def test_a_dictionary_that_is_not_at_hand_is_left_out_with_its_reason(tmp_path, missing):
    model, hook = gpt2(), "blocks.1.hook_resid_post"
    with captured(model, tmp_path / "s", [], [hook]) as store:
        code = lm.Control(arch="random", d_sae=24, k=4, seed=0).fit(
            store.vectors(hook, batch_tokens=64)
        )
        latents = lm.store_latents(store, code, halves=True)
        if missing == "folder":
            about = store.sql("FROM dictionaries").to_arrow_table().to_pylist()
            store.append("dictionaries", [{**about[0], "path": "gone"}])
        facts = promotes(store, model)
    assert facts["hooks"] == [] and list(facts["left_out"]) == [latents]

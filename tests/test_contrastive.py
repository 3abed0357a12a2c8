"""Contrastive heads: InfoNCE by hand, positives that differ, families by name, the same bits."""

import math

import lookup_model
import numpy as np
import pytest
import torch
from small_models import tiny

import lmmono as lm
from lmmono.errors import RobustnessError, TrainError
from lmmono.methods import contrastive
from lmmono.methods.contrastive import ContrastiveHead, info_nce, positive_pairs
from lmmono.recipe.robustness_settings import FamilySettings
from lmmono.suites.feature_families import FeatureFamily, as_family
from lmmono.suites.text_codes import EncodedTexts, ProbedCode, TextEncoder

HOOK = "blocks.1.hook_resid_post"
TEXTS = [" ".join(f"w{(7 * i + j * j) % 38 + 1}" for j in range(5 + i % 9)) for i in range(40)]


def pairs(n=64, d=6):
    torch.manual_seed(0)
    core = torch.randn(n, d)
    return core + 0.3 * torch.randn(n, d), core + 0.3 * torch.randn(n, d)


def rows(family="gpt2", texts=TEXTS, **settings):
    """Texts of a tiny model as families get them."""
    codes = [ProbedCode("raw", FeatureFamily("raw"), HOOK, "mean")]
    encoder = TextEncoder(tiny(family, **settings), lookup_model.tokenizer(), codes)
    return EncodedTexts(encoder, HOOK, texts)


def test_info_nce_is_its_formula():
    a, b = (side[:5].double() for side in pairs())
    z = [side[i] / side[i].norm() for side in (a, b) for i in range(5)]
    total = 0.0
    for i in range(10):
        others = sum(math.exp(float(z[i] @ z[j]) / 0.2) for j in range(10) if j != i)
        total -= math.log(math.exp(float(z[i] @ z[(i + 5) % 10]) / 0.2) / others) / 10
    assert float(info_nce(a, b, 0.2)) == pytest.approx(total, abs=1e-9)


def test_heads_differ_in_the_map_alone_and_learn_what_pairs_share():
    a, b = pairs()
    ncl, cl = (ContrastiveHead(map=name, d=12, steps=60).fit((a, b)) for name in ("rep_relu", None))
    assert {k: v.shape for k, v in ncl.tensors().items()} == {
        k: v.shape for k, v in cl.tensors().items()
    }
    assert (ncl.encode(a) >= 0).all() and (cl.encode(a) < 0).any()
    for head in (ncl, cl):
        assert np.mean(head.losses[-10:]) < 0.8 * np.mean(head.losses[:5])
    unit = ContrastiveHead(map="rep_relu", d=12, steps=60, normalised=True).fit((a, b)).encode(a)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(ncl.encode(a), dim=1))
    spread = ContrastiveHead(map="rep_relu", d=12, steps=60, spread=5.0).fit((a, b)).encode(a)
    shares = [z / z.norm(dim=1, keepdim=True).clamp_min(1e-9) for z in (ncl.encode(a), spread)]
    assert shares[1].abs().mean() > shares[0].abs().mean(), "the term spreads"
    want = (
        info_nce(*(ncl._net.code(x) for x in (a, b)), 0.2)
        - 5
        * torch.cat(
            [torch.nn.functional.normalize(ncl._net.code(x), dim=1).abs() for x in (a, b)]
        ).mean()
    )
    ncl._net.how = contrastive.HeadSettings(map="rep_relu", d=12, spread=5.0)
    torch.testing.assert_close(ncl._net.loss(a, b), want)


def test_csr_keeps_k_and_its_loss_is_the_sum_of_its_terms():
    a, b = pairs()
    head = ContrastiveHead(map=None, d=24, k=3, steps=40).fit((a, b))
    assert ((head.encode(a) > 0).sum(dim=1) <= 3).all() and head.losses[-1] < head.losses[0]
    net, x = head._net, torch.cat([a, b])
    net.silent.zero_()
    acts = torch.relu((x - net.b_pre) @ net.weight.T + net.bias)

    def kept(k):
        return acts * (acts >= acts.sort(dim=1, descending=True).values[:, k - 1 : k])

    parts = [(x - net.b_pre - kept(k) @ net.weight).square().mean() for k in (3, 12)]
    want = (parts[0] + parts[1] / 8) / (x - x.mean(0)).square().mean()
    want = want + 0.1 * info_nce(*kept(3).chunk(2), 0.2)
    torch.testing.assert_close(net.loss(a, b), want, atol=1e-5, rtol=1e-5)


def test_two_identical_passes_are_no_pair():
    same = pairs()[0]
    with pytest.raises(RobustnessError, match="two identical passes teach nothing"):
        ContrastiveHead(steps=1).fit((same, same.clone()))
    a, b = positive_pairs(rows(), "dropout", 0)
    assert (a != b).any(dim=1).all() and torch.equal(a, positive_pairs(rows(), "dropout", 0)[0])
    still = positive_pairs(rows("crate"), "dropout", 0)
    with pytest.raises(RobustnessError, match="got 0 of 40"):
        ContrastiveHead(steps=1).fit(still)


def test_spans_share_no_token_and_sentences_are_neighbours(monkeypatch):
    random = np.random.default_rng(0)
    for n in (4, 5, 9, 200):
        ids = np.arange(n + 1)
        for _ in range(20):
            one, two = contrastive._two_spans(ids, random)
            assert one[0] == two[0] == 0 and not set(one[1:]) & set(two[1:])
            assert len(one) == len(two) == min(64, n // 2) + 1 and two[-1] <= n
            assert (np.diff(one[1:]) == 1).all() and (np.diff(two[1:]) == 1).all()
    text = "One two. Three four! Five?\nSix"
    for _ in range(10):
        assert contrastive._neighbours(text, random) in [
            ("One two.", "Three four!"),
            ("Three four!", "Five?"),
            ("Five?", "Six"),
        ]
    joined = [f"{one}. {two}." for one, two in zip(TEXTS, TEXTS[1:], strict=False)]
    whole = rows(texts=joined)
    firsts = whole.means(whole.ids([f"{text}." for text in TEXTS[:-1]]))
    torch.testing.assert_close(positive_pairs(whole, "sentences", 0)[0], firsts)
    with pytest.raises(RobustnessError, match="positives sentences: 0 of 40 texts have two"):
        positive_pairs(rows(), "sentences", 0)


def test_a_head_is_saved_and_resumed_to_the_same_bits(tmp_path, monkeypatch):
    data = pairs()
    plain = ContrastiveHead(d=8, steps=30, seed=1).fit(data)
    ContrastiveHead.load(plain.save(tmp_path / "head"))
    loaded = ContrastiveHead.load(tmp_path / "head")
    assert torch.equal(loaded.encode(data[0]), plain.encode(data[0]))
    assert loaded.settings == plain.settings

    whole = contrastive.minimise
    monkeypatch.setattr(
        contrastive, "minimise", lambda *a, **k: whole(*a, **k, checkpoint_every=10)
    )

    class Killed(Exception):
        pass

    loss, steps = contrastive._Projector.loss, []

    def dying(self, a, b):
        steps.append(1)
        if len(steps) == 26:
            raise Killed
        return loss(self, a, b)

    monkeypatch.setattr(contrastive._Projector, "loss", dying)
    head = ContrastiveHead(d=8, steps=30, seed=1)
    with pytest.raises(Killed):
        head.fit(data, folder=tmp_path / "part")
    (saved,) = (tmp_path / "part").iterdir()
    content = saved.read_bytes()
    saved.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(TrainError, match="damaged, so the fit cannot be resumed; remove"):
        head.fit(data, folder=tmp_path / "part")
    saved.write_bytes(content)
    head.fit(data, folder=tmp_path / "part")
    assert len(steps) == 26 + 10, "it went on at step 20"
    assert head.losses == plain.losses and torch.equal(head.encode(data[0]), plain.encode(data[0]))
    assert not list((tmp_path / "part").iterdir())
    with pytest.raises(TrainError, match="want an lr below 1e"):
        ContrastiveHead(d=8, steps=30, lr=1e30).fit(data)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("weights.safetensors", lambda b: b[:-3] + bytes([b[-3] ^ 4]) + b[-2:], "other bytes than"),
        ("about.json", lambda _: b"{}", "other bytes than were written"),
        ("about.json", lambda b: b.replace(b'"d_in"', b'"width"'), "damaged, or of another kind"),
        ("about.json", lambda b: b.replace(b'"d": 8', b'"d": 9'), "damaged, or of another kind"),
        ("about.json", lambda _: b"[" * 9_999, "recursion limit"),
    ],
)
def test_a_damaged_head_is_refused(tmp_path, name, damage, said):
    file = ContrastiveHead(d=8, steps=2, seed=1).fit(pairs()).save(tmp_path / "head") / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RobustnessError, match=said):
        ContrastiveHead.load(file.parent)


def test_families_are_heads_by_name():
    families = {
        name: FamilySettings(name=name, d=10, steps=20) for name in ("cl", "ncl", "csr")
    } | {"soft": FamilySettings(name="ncl", d=10, steps=20, map="softplus", spread=True)}
    assert families["soft"].label == "ncl-10-softplus-20steps-spread"
    made = lm.robustness(
        lookup_model.Lookup(),
        lookup_model.small_task(),
        features={"raw": None, **families},
        hook=lookup_model.HOOK,
        learners=["logistic", "nonneg_ce"],
        seeds=1,
        margins=(1.0,),
        rates=(),
    )
    said = {(row["feature"], row["probe"]): row for row in made.rows}
    assert len(said) == 10 and all(row["failure"] is None for row in made.rows)
    assert {row["settings"]["d"] for row in made.rows} == {96, 10}
    assert (
        said["ncl", "logistic"]["settings"]["l0"] < 10 == said["cl", "logistic"]["settings"]["l0"]
    )
    assert said["csr", "logistic"]["settings"]["l0"] <= 8
    digests = {row["settings"]["digest"] for row in made.rows}
    assert len(digests) == 10


def test_what_a_family_of_texts_cannot_do_is_told():
    with pytest.raises(RobustnessError, match="reads the mean row of a text"):
        lm.robustness(
            tiny("gpt2"), lookup_model.small_task(), features={"ncl": "ncl"}, hook=HOOK,
            poolings=("mean", "last"), tokenizer=lookup_model.tokenizer(),
        )  # fmt: skip
    with pytest.raises(RobustnessError, match="ncl: learned from pairs of a text's rows"):
        FeatureFamily("ncl").fit(pairs()[0])
    with pytest.raises(RobustnessError, match="cl: map=relu: it has the settings: d, positives"):
        FeatureFamily("cl", map="relu")
    head = ContrastiveHead(d=8, steps=5).fit(pairs())
    mine = as_family("mine", head.encode).fit(pairs()[0])
    assert mine.reads == "texts" and mine.d == 8

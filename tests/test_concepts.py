"""Concept comparators: formulas by hand, planted truth, the same bits again and after saving."""

import math

import lookup_model
import numpy as np
import pytest
import torch
from small_models import tiny

from lmmono.errors import DataError, RobustnessError
from lmmono.methods.concepts.bottleneck import ConceptBottleneck
from lmmono.methods.concepts.concept_texts import read_concepts, text_rows
from lmmono.methods.concepts.dolfin import Dolfin
from lmmono.methods.concepts.hi_concept import HiConcept
from lmmono.methods.concepts.induction import InductionGram
from lmmono.methods.concepts.suffixes import SuffixIndex, suffix_array


def planted(n=300, d=12, k=3):
    """Rows in which concept j is the sign of coordinate j; the class is concept 0 or 1."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=random)
    concepts = (x[:, :k] > 0).long()
    return x, (concepts[:, 0] | concepts[:, 1]).long(), concepts


@pytest.mark.parametrize("mode", ["joint", "sequential", "independent", "standard"])
def test_a_bottleneck_learns_concepts_and_its_logits_are_sums_of_theirs(mode, tmp_path):
    x, y, c = planted()
    made = ConceptBottleneck(mode=mode, steps=150).fit(x, y, c)
    right = (made.concept_logits(x).argmax(-1) == c).float().mean()
    least = {"joint": 0.85, "sequential": 0.95, "independent": 0.95}
    assert right > least[mode] if mode != "standard" else right < 0.8
    said = made.predict(x)
    accuracy = (said.argmax(-1) == y).float().mean()
    assert accuracy > 0.84, "an OR is not linear in the rows"
    total = made.contributions(x).sum(-1) + made._net.head.bias.detach()
    torch.testing.assert_close(total.log_softmax(-1), said, atol=1e-4, rtol=1e-4)
    told = made.predict(x, truth=c, which=(0, 1, 2))
    if mode in ("sequential", "independent"):  # joint heads read what concepts' softmax cannot see
        assert (told.argmax(-1) == y).float().mean() >= accuracy
        turned = made.predict(x, truth=torch.zeros_like(c), which=(0, 1)).argmax(-1)
        assert (turned == 0).float().mean() > 0.9, "with both concepts off it is class 0"
    loaded = ConceptBottleneck.load(made.save(tmp_path / mode))
    assert torch.equal(loaded.predict(x), said)
    assert torch.equal(loaded.predict(x, truth=c, which=(1,)), made.predict(x, truth=c, which=(1,)))
    again = ConceptBottleneck(mode=mode, steps=150).fit(x, y, c)
    assert torch.equal(again.predict(x), said)


def test_concept_logits_have_no_sigmoid_and_mixup_mixes_both_labels(monkeypatch):
    x, y, c = planted()
    made = ConceptBottleneck(steps=400).fit(x, y, c)
    assert made.concept_logits(x).softmax(-1).max() > math.e / (math.e + 1), "two values"
    mixed = ConceptBottleneck(steps=150, mixup=0.4).fit(x, y, c)
    assert not torch.equal(mixed.predict(x), made.predict(x))
    assert (mixed.predict(x).argmax(-1) == y).float().mean() > 0.84
    with pytest.raises(RobustnessError, match="which are not mixed"):
        ConceptBottleneck(mode="independent", mixup=0.4).fit(x, y, c)
    with pytest.raises(RobustnessError, match="300 rows, 299 labels"):
        ConceptBottleneck().fit(x, y[1:], c)


def test_high_impact_concepts_change_what_the_model_says(tmp_path):
    x, _, _ = planted(d=8)
    weight = torch.zeros(2, 8)
    weight[0, 0], weight[1, 1] = 3.0, 3.0

    def tail(rows):
        return rows @ weight.T

    settings = {"n_concepts": 4, "d_hidden": 32, "steps": 300, "lr": 1e-2, "gate": 0.0}
    made = HiConcept(**settings).fit(x, tail)
    without = HiConcept(**settings, impact=0.0).fit(x, tail)
    assert made.recovered(x, tail) > 0.8
    assert made.impacts.sum() > without.impacts.sum() and made.kept.any()
    loaded = HiConcept.load(made.save(tmp_path / "hi"))
    assert torch.equal(loaded.encode(x), made.encode(x)) and torch.equal(loaded.kept, made.kept)
    assert torch.equal(HiConcept(**settings).fit(x, tail).encode(x), made.encode(x))
    with pytest.raises(RobustnessError, match="a gate below 1"):
        HiConcept(gate=1.0).fit(x, tail)


def test_the_loss_of_high_impact_concepts_is_its_formula():
    x, _, _ = planted(n=40, d=8)
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    classes = (x @ weight.T).argmax(-1)
    made = HiConcept(n_concepts=4, d_hidden=16, steps=2, masked=0.0).fit(x, lambda r: r @ weight.T)
    net = made._net
    c = net.directions / net.directions.norm(dim=0)
    h = x / x.norm(dim=1, keepdim=True)
    s = (h @ c).softmax(1)
    p = torch.stack([row * (row > 0.1) / row[row > 0.1].sum() for row in s])
    back = (p @ net.decoder[0].weight.T).clamp_min(0) @ net.decoder[2].weight.T
    torch.testing.assert_close(made.encode(x), p.detach(), atol=1e-5, rtol=1e-4)
    logits = back * x.norm(dim=1, keepdim=True) @ weight.T
    want = (back - h).square().sum(1).mean()
    want = want + torch.nn.functional.cross_entropy(logits, classes)
    want = want - 0.1 * (h @ c).sort(0, descending=True).values[:10].mean()
    want = want + 0.5 * (c.T @ c - torch.eye(4)).square().mean()
    got = net.loss(x, classes, lambda r: r @ weight.T, with_impact=True)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # nothing masked: no impact
    opposite = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert (opposite.T @ opposite - torch.eye(2)).square().mean() > 0, "a signed mean would be < 0"


@pytest.mark.parametrize("presence", ["max", "noisy_or"])
@pytest.mark.parametrize("variant", ["sum", "vector"])
def test_dolfin_finds_the_words_that_decide(presence, variant, tmp_path):
    random = torch.Generator().manual_seed(0)
    table = torch.randn(12, 10, generator=random)
    words = [torch.randint(1, 12, (6,), generator=random) for _ in range(160)]
    for i in range(0, 160, 2):
        words[i][i % 6] = 0
    rows, y = [table[w] for w in words], torch.tensor([int((w == 0).any()) for w in words])
    made = Dolfin(n_features=6, d=16, presence=presence, variant=variant, steps=150).fit(rows, y)
    assert (made.predict(rows).argmax(-1) == y).float().mean() > 0.84
    net, of_text = made._net, rows[0]
    p = ((of_text - net.centre) / net.scale @ net.project.weight.T + net.project.bias).detach()
    p = (p @ net.features.detach().T).softmax(-1)
    present = p.amax(0) if presence == "max" else 1 - (1 - p).prod(0)
    torch.testing.assert_close(made.encode(rows[:1])[0], present, atol=1e-5, rtol=1e-4)
    seen = torch.eye(6) @ net.features.detach() if variant == "sum" else torch.eye(6)
    of_class = (seen @ net.head.weight.T + net.head.bias).softmax(-1).detach()
    want = torch.zeros(6, 2)
    for t in range(6):
        for k in range(6):
            want[t] += p[t, k] / p[:, k].sum() * present[k] * of_class[k]
    torch.testing.assert_close(made.support(of_text), want, atol=1e-5, rtol=1e-4)
    if (presence, variant) == ("max", "sum"):
        hits = [int(made.support(rows[i])[:, 1].argmax()) == i % 6 for i in range(0, 160, 2)]
        assert np.mean(hits) > 0.7, "the word that decides supports the class most"
        loaded = Dolfin.load(made.save(tmp_path / "dolfin"))
        assert torch.equal(loaded.predict(rows), made.predict(rows))


def test_suffixes_are_in_order_and_found():
    random = np.random.default_rng(0)
    ids = random.integers(0, 4, 200)
    order = suffix_array(ids)
    want = sorted(range(200), key=lambda i: ids[i:].tolist())
    assert order.tolist() == want
    index = SuffixIndex(ids)
    for n in (1, 2, 5):
        pattern = ids[50 : 50 + n]
        low, high = index.range_of(pattern)
        hits = [i for i in range(201 - n) if (ids[i : i + n] == pattern).all()]
        assert sorted(order[low:high].tolist()) == hits
    low, high = index.range_of(np.array([9]))
    assert low == high


def test_the_longest_match_speaks_and_says_where_it_was_seen():
    corpus = np.array([5, 1, 2, 3, 9, 1, 2, 4])
    model = InductionGram(d_vocab=10, threshold=1, floor=0.1).fit(corpus)
    unigram = (np.bincount(corpus, minlength=10) + 1) / 18
    p, why = model.predict(np.array([0, 1, 2]))
    assert (why.source, why.n_matched) == ("corpus", 2)
    assert sorted(why.places) == [(3, 0.5, 3), (7, 0.5, 4)]
    np.testing.assert_allclose(p, 0.1 * unigram + 0.45 * (np.eye(10)[3] + np.eye(10)[4]))
    p, why = model.predict(np.array([1, 2, 8, 7, 6, 1, 2]))
    assert (why.source, why.n_matched, why.places) == ("context", 2, ((2, 1.0, 8),)), "a tie"
    p, why = model.predict(np.array([8]))
    assert why.source == "unigram" and np.allclose(p, unigram)
    loss = model.evaluate([np.array([0, 1, 2, 3])])
    said = [model.predict(np.array([0, 1, 2, 3][:n]))[0] for n in (1, 2, 3)]
    want = -np.mean([np.log(said[0][1]), np.log(said[1][2]), np.log(said[2][3])])
    assert loss.loss == pytest.approx(want) and loss.n_tokens == 3
    assert sum(loss.speakers.values()) == pytest.approx(1)
    with pytest.raises(DataError, match="ids beyond d_vocab"):
        InductionGram(d_vocab=4).fit(corpus)


def test_fuzzy_places_weigh_as_their_likeness_says():
    rows = {"cosine": np.random.default_rng(0).standard_normal((10, 4))}
    rows["jsd"] = np.random.default_rng(1).dirichlet(np.ones(4), 10)
    ids = np.array([3, 4, 5, 4, 6])
    for kind, table in rows.items():
        model = InductionGram(d_vocab=10, rows=lambda x, t=table: t[x], likeness=kind, floor=0.01)
        p, why = model.fit(np.array([1, 2])).predict(ids)
        this, weights = table[6], []
        for i in range(4):
            other = table[ids[i]]
            if kind == "cosine":
                cos = other @ this / np.linalg.norm(other) / np.linalg.norm(this)
                weights.append(np.exp(-(1 - cos) / 0.1))
            else:
                middle = (other + this) / 2
                kl = [(each * np.log(each / middle)).sum() for each in (other, this)]
                weights.append(np.exp(-sum(kl) / 2))
        weights = np.array(weights) / sum(weights)
        assert why.source == "fuzzy" and len(why.places) == 4
        got = {at: weight for at, weight, _ in why.places}
        np.testing.assert_allclose([got[i] for i in (1, 2, 3, 4)], weights)
        np.testing.assert_allclose(p[4], 0.01 / 12 + 0.99 * (weights[0] + weights[2]))


def test_repeats_are_predicted_and_noise_is_not():
    random = np.random.default_rng(0)
    half = random.integers(0, 30, 40)
    model = InductionGram(d_vocab=30).fit(random.integers(0, 30, 500))
    again = model.evaluate([np.concatenate([half, half])])
    never = model.evaluate([random.integers(0, 30, 80)])
    assert again.accuracy > 0.4 > 0.15 > never.accuracy and again.loss < never.loss


def test_texts_with_concepts_are_read_by_split(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text(
        "text,label_name,food,noise,split\n"
        "good soup,5,Positive,unknown,train\n"
        "loud place,2,unknown,Negative,train\n"
        "they differ,no majority,unknown,unknown,train\n"
        "fine,3,Positive,Negative,test\n"
    )
    parts = read_concepts(path, concepts=["food", "noise"])
    assert set(parts) == {"train", "test"} and parts["train"].texts == ("good soup", "loud place")
    train = parts["train"]
    assert train.values == ("Negative", "Positive", "unknown") and train.names == ("food", "noise")
    assert train.concepts.tolist() == [[1, 2], [2, 0]] and train.labels.tolist() == [2, 0]
    assert train.label_names == ("2", "3", "5")
    with pytest.raises(DataError, match="no column 'foods'; .*did you mean food"):
        read_concepts(path, concepts=["foods"])
    words = lookup_model.tokenizer()
    rows = text_rows(tiny("gpt2"), ["w1 w2 w3", "w4"], "blocks.0.hook_resid_post", words)
    assert [tuple(each.shape) for each in rows] == [(3, 16), (1, 16)]

"""The Hub: what goes up comes down with equal outputs, through a server that speaks its API."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, Hub, serving
from huggingface_hub import constants, snapshot_download

import lmmono as lm
from lmmono.dictionaries.architectures import sae_lens
from lmmono.dictionaries.vector_source import ArrayVectors
from lmmono.errors import DictionaryError
from lmmono.interop.dictionary_hub import card, load_from_hub, push_dictionary

# huggingface_hub's own upload of large files calls its HTTP client in an old way
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    # the other way up and down is a binary that speaks to storage servers of its own
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # the server is on this machine: a setting that keeps tests off the network is not about it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def sae() -> lm.SAE:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 4, generator=generator).relu() @ torch.randn(4, 12, generator=generator)
    vectors = ArrayVectors(x, hook=HOOK)
    return lm.SAE("topk", d_sae=24, k=4, steps=60, lr=1e-2, seed=3).fit(vectors)


def some_vectors() -> torch.Tensor:
    return torch.randn(32, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def options(hub: Hub) -> dict[str, Any]:
    return {"endpoint": hub.address, "token": TOKEN}


def test_a_dictionary_goes_up_in_one_commit_and_comes_down_the_same(
    hub: Hub, options: dict[str, Any], sae: lm.SAE, tmp_path: Path
) -> None:
    url = push_dictionary(sae, "someone/sae", **options)
    assert url.startswith(f"{hub.address}/someone/sae/commit/")
    assert hub.private["someone/sae"] and len(hub.commits["someone/sae"]) == 2
    assert hub.messages == [f"Add {sae!r}"]
    assert len(hub.large) == 1  # the weights went up as a large file
    names = {"README.md", "cfg.json", "dictionary.json"}
    assert set(hub.files("someone/sae")) == names | {"sae_weights.safetensors"}
    found = load_from_hub("someone/sae", cache=tmp_path / "cache", **options)
    assert isinstance(found, lm.SAE) and found.digest == sae.digest and found.hook == HOOK
    assert found.encode(some_vectors()).equal(sae.encode(some_vectors()))
    n_asked = len(hub.asked)
    load_from_hub("someone/sae", cache=tmp_path / "cache", **options)
    assert not [line for line in hub.asked[n_asked:] if "/resolve/" in line]


def test_sae_lens_reads_what_is_on_the_hub(
    hub: Hub, options: dict[str, Any], sae: lm.SAE, tmp_path: Path
) -> None:
    push_dictionary(sae, "someone/sae", folder="layer 0/sae", **options)
    folder = snapshot_download("someone/sae", cache_dir=tmp_path, **options)
    network = sae_lens().SAE.load_from_disk(Path(folder) / "layer 0/sae")
    with torch.no_grad():
        torch.testing.assert_close(network(some_vectors()), sae.reconstruct(some_vectors()))


def test_several_dictionaries_share_a_repository_and_revisions_are_kept(
    hub: Hub, options: dict[str, Any], sae: lm.SAE, tmp_path: Path
) -> None:
    identity = lm.Control("raw").fit(some_vectors())
    push_dictionary(sae, "someone/both", folder="sae", private=False, message="First", **options)
    first = f"{len(hub.commits['someone/both']):040x}"
    push_dictionary(identity, "someone/both", folder="sae", **options)
    assert hub.private["someone/both"] is False and hub.messages[0] == "First"
    options["cache"] = tmp_path
    old = load_from_hub("someone/both", folder="sae", revision=first, hook="mine", **options)
    assert old.digest == sae.digest and old.hook == "mine"
    with pytest.raises(DictionaryError, match="no dictionary in its first folder"):
        load_from_hub("someone/both", **options)
    with pytest.raises(DictionaryError, match="no dictionary in elsewhere/"):
        load_from_hub("someone/both", folder="elsewhere", **options)


def test_what_other_tools_pushed_is_read(
    hub: Hub, options: dict[str, Any], sae: lm.SAE, tmp_path: Path
) -> None:
    push_dictionary(sae, "someone/sae", **options)
    del hub.files("someone/sae")["dictionary.json"]
    theirs = load_from_hub("someone/sae", cache=tmp_path, **options)
    assert not isinstance(theirs, lm.SAE) and theirs.hook == HOOK
    torch.testing.assert_close(theirs.encode(some_vectors()), sae.encode(some_vectors()))


def test_refusals_of_the_hub_are_told(
    hub: Hub, options: dict[str, Any], sae: lm.SAE, tmp_path: Path
) -> None:
    options["cache"] = tmp_path
    with pytest.raises(DictionaryError, match="someone/none.*Check the name, the token"):
        load_from_hub("someone/none", **options)
    with pytest.raises(DictionaryError, match="load_from_hub: a b c"):
        load_from_hub("a b c", **options)
    push_dictionary(sae, "someone/sae", endpoint=hub.address, token=TOKEN)
    with pytest.raises(DictionaryError, match=r"(?s)someone/sae.*nosuch"):
        load_from_hub("someone/sae", revision="nosuch", **options)
    with pytest.raises(DictionaryError, match="401"):
        push_dictionary(sae, "someone/sae", endpoint=hub.address, token="hf_wrong")
    with pytest.raises(DictionaryError, match="not fitted"):
        push_dictionary(lm.SAE("topk", d_sae=8, k=2), "someone/x", endpoint=hub.address)


def test_a_hub_that_is_not_there_is_told(hub: Hub, sae: lm.SAE, tmp_path: Path) -> None:
    away = "http://127.0.0.1:9"
    with pytest.raises(DictionaryError, match="someone/sae"):
        push_dictionary(sae, "someone/sae", endpoint=away, token=TOKEN)
    with pytest.raises(DictionaryError, match="someone/sae"):
        load_from_hub("someone/sae", endpoint=away, token=TOKEN, cache=tmp_path)
    assert hub.asked == []


def test_the_card_says_hook_settings_and_what_was_measured_only(sae: lm.SAE) -> None:
    text = card(sae)
    for line in (f"| hook | {HOOK} |", "| k | 4 |", "| d_sae | 24 |", "| seed | 3 |"):
        assert line in text.splitlines()
    assert f"| n_tokens | {sae.facts['n_tokens']} |" in text
    assert "## Measured" not in text
    settings = json.dumps(sae.settings.model_dump(mode="json"))
    assert "steps" in settings and "| steps | 60 |" in text


class Report:
    """What is used of an evaluation."""

    n_tokens, n_documents, split = 1000, 20, "score"

    def rows(self) -> list[dict[str, Any]]:
        interval = {"ci_low": 0.2, "ci_high": 0.3, "ci_level": 0.95}
        return [
            {"metric": "fvu", "preset": None, "value": 0.25, **interval},
            {"metric": "kl", "preset": "zero", "value": None},
        ]


def test_the_card_has_the_numbers_of_an_evaluation_with_their_intervals(sae: lm.SAE) -> None:
    lines = card(sae, Report()).splitlines()
    assert "| fvu |  | 0.25 | 0.2 | 0.3 | 0.95 |" in lines
    assert "| kl | zero |  |  |  |  |" in lines
    assert "On 1,000 tokens of 20 score documents." in lines

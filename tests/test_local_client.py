"""The local client: batches and shared starts give what the model alone gives, text by text."""

from itertools import pairwise

import pytest
import torch
from small_clients import CHAT, byte_tokens, letters, model_of, reader_of_bytes
from small_models import FAMILIES

from lmmono.clients.client import Answer, Client, Message, Prompt
from lmmono.clients.local import LocalClient
from lmmono.errors import ClientError, DataError, ModelError
from lmmono.models.storage import save_model

TEXTS = ["the cat 10\tx", "the cat 9", "the cab sat on 1 mat", "the c"]


def alone(family: str, text: str) -> torch.Tensor:
    """Return log-probabilities [pos, d_vocab] of one text by one forward pass."""
    ids = torch.tensor([letters()(text)["input_ids"]])
    with torch.no_grad():
        return torch.log_softmax(model_of(family)(ids).logits[0].float(), dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_in_batches_gives_the_log_probabilities_of_each_text_alone(family: str) -> None:
    client = LocalClient(model_of(family), letters())
    readings = client.read(TEXTS, n_alternatives=3)
    for text, reading in zip(TEXTS, readings, strict=True):
        expected, ids = alone(family, text), letters()(text)["input_ids"]
        assert "".join(reading.tokens) == text
        assert reading.logprobs[0] is None
        assert reading.alternatives[0] == {}
        want = [expected[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
        assert list(reading.logprobs[1:]) == pytest.approx(want, abs=1e-4)
        for t, found in enumerate(reading.alternatives[1:]):
            best = expected[t].topk(3)
            names = [letters().decode([i]) for i in best.indices.tolist()]
            assert sorted(found.values()) == pytest.approx(sorted(best.values.tolist()), abs=1e-4)
            gaps = [a - b for a, b in pairwise(best.values.tolist())]
            if min(gaps) > 1e-3:
                assert list(found) == names


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_batches_are_those_of_greedy_search_alone(family: str) -> None:
    model, client = model_of(family), LocalClient(model_of(family), letters())
    answers = client.complete([Prompt(text=text) for text in TEXTS], max_tokens=6)
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = letters()(text)["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer.text == letters().decode(ids[-6:])
        assert (answer.usage.n_calls, answer.usage.n_completion_tokens) == (1, 6)


def test_sampling_depends_on_prompt_and_seed_and_not_on_the_batch() -> None:
    client = LocalClient(model_of("llama"), letters())
    prompts = [Prompt(text=text) for text in TEXTS]
    together = client.complete(prompts, max_tokens=12, temperature=1.0, seed=3)
    apart = [client.complete([each], max_tokens=12, temperature=1.0, seed=3)[0] for each in prompts]
    assert [each.text for each in together] == [each.text for each in apart]
    other = client.complete(prompts, max_tokens=12, temperature=1.0, seed=4)
    assert [each.text for each in together] != [each.text for each in other]


def test_sampling_draws_tokens_as_often_as_the_model_expects_them() -> None:
    client = LocalClient(model_of("llama"), letters())
    shares = torch.softmax(alone("llama", "the")[-1] / 0.7, dim=-1)
    drawn = [
        client.complete([Prompt(text="the")], max_tokens=1, temperature=0.7, seed=seed)[0].text
        for seed in range(400)
    ]
    best = shares.topk(3)
    for i, share in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        error = (share * (1 - share) / 400) ** 0.5
        assert abs(drawn.count(letters().decode([i])) / 400 - share) < 4 * error


def test_alternatives_of_an_answer_line_up_with_its_tokens() -> None:
    client = LocalClient(model_of("gpt2"), letters())
    (answer,) = client.complete([Prompt(text="the cat")], max_tokens=5, n_alternatives=2)
    assert answer.text is not None
    assert len(answer.tokens) == len(answer.alternatives) == 5
    assert "".join(answer.tokens) == answer.text
    for token, found in zip(answer.tokens, answer.alternatives, strict=True):
        assert next(iter(found)) == token  # greedy: the likeliest is taken
    first = alone("gpt2", "the cat")[-1].topk(2).values.tolist()
    assert list(answer.alternatives[0].values()) == pytest.approx(first, abs=1e-4)


def test_the_end_of_text_ends_an_answer() -> None:
    model = model_of("gpt2")
    client = LocalClient(model, letters())
    (whole,) = client.complete([Prompt(text="the cat")], max_tokens=6)
    assert whole.text is not None
    end = next(i for i, letter in enumerate(whole.text) if letter != whole.text[0])
    model.generation_config.eos_token_id = letters()(whole.text)["input_ids"][end]
    try:
        ended = LocalClient(model, letters()).complete(
            [Prompt(text="the cat"), Prompt(text="a")], max_tokens=6
        )
    finally:
        model.generation_config.eos_token_id = None
    assert ended[0].text == whole.text[:end]
    assert ended[0].usage.n_completion_tokens == end


def test_a_shared_start_is_run_once() -> None:
    texts = ["the same start of all " + end for end in ("a", "b", "c", "d")]
    with_start = LocalClient(model_of("llama"), letters())
    without = LocalClient(model_of("llama"), letters(), share_start=False)
    shared, apart = with_start.read(texts, n_alternatives=2), without.read(texts, n_alternatives=2)
    assert with_start.n_tokens_run == 22 + 4
    assert without.n_tokens_run == 4 * 23
    for a, b in zip(shared, apart, strict=True):
        assert list(a.logprobs[1:]) == pytest.approx(list(b.logprobs[1:]), abs=1e-4)


def test_small_batches_change_nothing() -> None:
    one = LocalClient(model_of("gpt2"), letters(), batch_tokens=1).read(TEXTS)
    for a, b in zip(one, LocalClient(model_of("gpt2"), letters()).read(TEXTS), strict=True):
        assert list(a.logprobs[1:]) == pytest.approx(list(b.logprobs[1:]), abs=1e-4)


def test_a_character_of_several_tokens_is_in_the_last_of_them() -> None:
    client = LocalClient(reader_of_bytes(), byte_tokens())
    (reading,) = client.read(["aé€b"])
    assert reading.tokens == ("a", "", "é", "", "", "€", "b")


def test_the_chat_template_is_used_where_there_is_one() -> None:
    turns = (Message("system", "be brief"), Message("user", "hi"))
    templated = LocalClient(reader_of_bytes(), byte_tokens(CHAT))
    plain = LocalClient(reader_of_bytes(), byte_tokens())
    (chat,) = templated.complete([Prompt(turns)], max_tokens=3)
    (same,) = plain.complete([Prompt(text="<system>be brief<user>hi<assistant>")], max_tokens=3)
    assert (chat.text, chat.usage.n_prompt_tokens) == (same.text, 35)
    (bare,) = plain.complete([Prompt(turns)], max_tokens=3)
    assert bare.usage.n_prompt_tokens == len("be brief\n\nUser: hi\n\nAssistant:")


def test_a_prompt_that_does_not_fit_costs_one_answer() -> None:
    client = LocalClient(model_of("gpt2"), letters())
    heard: list[tuple[int, Answer]] = []
    prompts = [Prompt(text="a" * 40), Prompt(text="the"), Prompt(text="")]
    answers = client.complete(
        prompts, max_tokens=3, on_answer=lambda i, each: heard.append((i, each))
    )
    assert [each.failure for each in answers] == ["no_answer", None, "no_answer"]
    assert "40 tokens and 3 more do not fit 32 positions" in answers[0].detail
    assert sorted(heard, key=lambda each: each[0]) == list(enumerate(answers))
    assert [each.failure for each in client.read(["a" * 40, "the"])] == ["no_answer", None]


def test_the_name_tells_weights_apart_and_folders_open(tmp_path) -> None:
    save_model(model_of("gpt2"), tmp_path / "judge")
    with pytest.raises(ClientError, match=r"judge: want a fast tokenizer .*pass tokenizer="):
        LocalClient(tmp_path / "judge")
    letters().save_pretrained(tmp_path / "judge")
    client = LocalClient(tmp_path / "judge")
    assert isinstance(client, Client)
    assert client.name.startswith("judge@")
    assert client.read(["the cat"])[0].logprobs[1:] == pytest.approx(
        LocalClient(model_of("gpt2"), letters()).read(["the cat"])[0].logprobs[1:], abs=1e-5
    )
    assert LocalClient(str(tmp_path / "judge")).name == client.name
    weight = model_of("gpt2").get_input_embeddings().weight
    with torch.no_grad():
        weight[[0, 1]] = weight[[1, 0]].clone()
        other = LocalClient(model_of("gpt2"), letters()).name
        weight[[0, 1]] = weight[[1, 0]].clone()
    assert other.partition("@")[2] != client.name.partition("@")[2]
    with pytest.raises(ModelError):
        LocalClient(tmp_path / "nowhere")
    (tmp_path / "judge" / "tokenizer.json").write_text('{"model": 5}')
    with pytest.raises(DataError, match=r"judge/tokenizer.json: broken"):
        LocalClient(tmp_path / "judge")

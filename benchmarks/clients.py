"""The local client, batched with the shared start run once, beside one call at a time.

    python benchmarks/clients.py [--repeats 3] [--records 32] [--d-model 128] [--layers 4]

A random GPT-2 over bytes reads the simulator's texts and answers the explainer's prompts. Prints
prompts per second of wall and of processor time (what a busy machine leaves comparable), medians of
interleaved repeats, and the ratio to one call at a time, then the largest difference between the
log-probabilities that the ways give.
"""

import argparse
import random
import statistics
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lmmono.clients.client import Prompt
from lmmono.clients.local import LocalClient
from lmmono.explanations.llm_prompts import Shown, max_act_prompt
from lmmono.explanations.llm_simulation import simulation_text

WORDS = [" the", " cat", " sat", " on", " a", " mat", " by", " door", ".", " and", " rain", " fell"]


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({each: i for i, each in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


def model(d_model: int, n_layers: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": d_model, "num_hidden_layers": n_layers, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "gpt2", vocab_size=256, max_position_embeddings=8192, **sizes, eos_token_id=None
    )
    return AutoModelForCausalLM.from_config(config).eval()


def records(n: int) -> list[Shown]:
    rng = random.Random(0)
    return [
        tuple((rng.choice(WORDS), rng.choice((0, 0, 0, 7))) for _ in range(64)) for _ in range(n)
    ]


def clients(args: argparse.Namespace) -> dict[str, LocalClient]:
    network, words = model(args.d_model, args.layers), tokenizer()
    return {
        "one at a time": LocalClient(network, words, batch_tokens=1, share_start=False),
        "batched": LocalClient(network, words, batch_tokens=32768, share_start=False),
        "batched, start once": LocalClient(network, words, batch_tokens=32768),
    }


def read(client: LocalClient, texts: list[str]) -> list[float]:
    found = client.read(texts, n_alternatives=15)
    return [logprob for each in found for logprob in each.logprobs if logprob is not None]


def report(
    what: str, n: int, seconds: dict[str, list[tuple[float, float]]], n_tokens: dict[str, int]
) -> None:
    medians = {
        name: [statistics.median(side) for side in zip(*each, strict=True)]
        for name, each in seconds.items()
    }
    slowest = medians["one at a time"]
    for name, (wall, processor) in medians.items():
        print(
            f"{what:<10} {name:<20} wall {n / wall:8.2f} prompts/s x{slowest[0] / wall:5.2f}, "
            f"processor {n / processor:8.2f} prompts/s x{slowest[1] / processor:5.2f}"
            f"  ({n_tokens[name]:,} tokens run)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("repeats", 3), ("records", 32), ("d-model", 128), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    shown = records(args.records)
    texts = [simulation_text("cats", [token for token, _ in each])[0] for each in shown]
    prompts: list[Prompt] = [max_act_prompt(shown[i : i + 4]) for i in range(0, len(shown), 4)]
    work = {
        "read": (len(texts), lambda client: read(client, texts)),
        "complete": (
            len(prompts),
            lambda client: [each.text for each in client.complete(prompts, max_tokens=20)],
        ),
    }
    for what, (n, ask) in work.items():
        seconds: dict[str, list[tuple[float, float]]] = {}
        results, n_tokens = {}, {}
        for _ in range(args.repeats):
            for name, client in clients(args).items():
                began = time.perf_counter(), time.process_time()
                results[name] = ask(client)
                took = time.perf_counter() - began[0], time.process_time() - began[1]
                seconds.setdefault(name, []).append(took)
                n_tokens[name] = client.n_tokens_run
        report(what, n, seconds, n_tokens)
        alone, best = results["one at a time"], results["batched, start once"]
        if what == "read":
            worst = max(abs(a - b) for a, b in zip(alone, best, strict=True))
            print(f"largest difference of log-probabilities: {worst:.1e}")
        else:
            print(f"answers that differ: {sum(a != b for a, b in zip(alone, best, strict=True))}")


if __name__ == "__main__":
    main()

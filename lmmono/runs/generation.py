"""Text from a trained run."""

from typing import Any

from lmmono.errors import ModelError
from lmmono.runs.folder import Run


def generate(
    run: Run, prompt: str, *, max_tokens: int = 64, temperature: float | int = 1.0, seed: int = 0
) -> str:
    """Return the prompt with the model's continuation.

    Args:
        run: A trained run.
        prompt: Text to go on from; empty starts a document.
        max_tokens: Most tokens to add; an end of text ends it earlier.
        temperature: Above 0 samples at this temperature; 0 takes the likeliest token.
        seed: Seed of the sampling.

    Raises:
        RunError: The run has no model.
        ModelError: Prompt and continuation do not fit the model's context.
    """
    import torch

    from activation_store.write.recording import input_device
    from lmmono.data.framing import text_start

    model: Any = run.model  # transformers types `generate` as a tensor
    tokenizer, n_ctx = run.tokenizer, run.recipe.data.n_ctx
    ids, start = tokenizer(prompt, add_special_tokens=False)["input_ids"], text_start(tokenizer)
    if not ids or start != tokenizer.eos_token_id:  # a BOS that the model has learned to want
        ids = [start, *ids]
    if len(ids) + max_tokens > n_ctx:
        raise ModelError(
            f"want prompt and continuation within {n_ctx} tokens, got {len(ids)} + {max_tokens}; "
            "shorten the prompt or ask for fewer tokens"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = torch.tensor([ids], device=input_device(model))
        output = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    return str(tokenizer.decode(output[0].tolist(), skip_special_tokens=True))

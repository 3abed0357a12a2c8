"""The stage `open`: a pretrained model is tried on the run's text, and its files are remembered."""

from typing import Any

import torch

from activation_store.write.recording import input_device
from lmmono.data.tokenizers import read_tokenizer
from lmmono.errors import ModelError
from lmmono.models.pretrained import (
    file_marks,
    fit_warnings,
    model_folder,
    on_best_device,
    require_fit,
)
from lmmono.recipe.sections import PretrainedModel, Train
from lmmono.runs.folder import Run
from lmmono.training.held_out import evaluate
from lmmono.types import Progress, silent

EVAL_TOKENS, BATCH_TOKENS = Train().eval_tokens, Train().batch_tokens
"""Held-out tokens, and those of one forward pass: as many as a training takes by default."""


def open_pretrained(run: Run, *, progress: Progress = silent) -> dict[str, Any]:
    """Open the model of a run, see that it fits text and tokenizer, and return the facts.

    Nothing is trained and nothing is copied: the manifest keeps the digests of the model's files,
    and what does not belong to them any more is refused later.

    Raises:
        ModelError: The model cannot be read, looks at later tokens, or fits neither the tokenizer
            nor the length of rows.
        DataError: The text cannot be read, or is too small.
    """
    section = run.recipe.model
    assert isinstance(section, PretrainedModel)
    model, tokenizer = run.model, run.tokenizer
    require_fit(model, tokenizer, run.recipe.data.n_ctx)
    _require_causal(model)
    rows = run.tokens("val").limit(EVAL_TOKENS, seed=run.recipe.seed)
    batch_rows = max(1, BATCH_TOKENS // rows.n_ctx)
    progress("loss of the model", 0, rows.ids.size)
    result = evaluate(on_best_device(model), rows, batch_rows, with_layers=False)
    progress("loss of the model", rows.ids.size, rows.ids.size)
    folder = model_folder(section.path, section.revision)
    own = read_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    # an untrained control is worse than guessing now and then, and its text is that of its run
    warnings = [] if section.untrained else fit_warnings(result.loss, tokenizer, own)
    return {
        "val_loss": result.loss,
        "val_loss_se": result.loss_se,
        "val_tokens": result.n_tokens,
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "arch": model.config.get_text_config().model_type,
        "weights": file_marks(section),
        "warnings": warnings,
        "data_digest": run.corpus.digest,
    }


@torch.no_grad()
def _require_causal(model: Any) -> None:
    """Refuse a model whose prediction at a token changes with the tokens after it, such as BERT."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 4, 3]], device=input_device(model))
    first, second = model(input_ids=ids, use_cache=False).logits.float()
    before, after = ((first - second).abs()[part].max() for part in (slice(2), slice(2, None)))
    if before > 1e-3 * after:  # rounding moves equal rows of a batch far less than that
        raise ModelError(
            f"{type(model).__name__} sees later tokens: what it predicts changes with them; want a "
            "causal language model (a decoder)"
        )

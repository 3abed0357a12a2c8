"""Models that were trained elsewhere: found by folder or Hub name, opened with their tokenizer.

Nothing is written: a model stays where it is, and who builds on it keeps the digests of its files.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmono.errors import ModelError
from lmmono.files.digests import file_digest
from lmmono.recipe.load import is_hub_name
from lmmono.recipe.sections import PretrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
else:  # for annotations only: a run that is done looks at its model's files and loads none
    PreTrainedModel = PreTrainedTokenizerFast = object

FileMark = list[str | int]
"""SHA-256 of a file, its size in bytes, and the time of its last change in nanoseconds."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
"""What decides the numbers of a model."""

_WANTED = (*_WEIGHTS, "*.json", "*.txt", "*.model", "vocab.bpe", "*.py", "*.jinja")
"""What is taken of a model on the Hub: its weights as safetensors alone, and its tokenizer."""


def open_model(
    path: Path | str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    adapter: Path | str | None = None,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Return a pretrained causal language model, in evaluation mode, with its tokenizer.

    The tokenizer of its folder is attached as `model.tokenizer`, so that `lm.run_with_cache` and
    all that takes text knows it; a folder without one gives a model without the attribute.

    Args:
        path: Folder that `save_pretrained` wrote, or a name on the Hugging Face Hub, which is
            downloaded once into its cache.
        revision: Branch, tag or commit on the Hub.
        dtype: `auto` for the type that the weights are saved in, or float32, bfloat16, float16.
        adapter: Folder or Hub name of a PEFT adapter (LoRA and its kin), merged into the weights.
        device: Torch device; by default the GPU where there is one.
        device_map: In place of a device, for a model larger than one: `auto`, `balanced`,
            `sequential`, or the device of each part (a number, `cpu` or `disk`) as in transformers.
        trust_remote_code: Run the Python files of the folder, where its configuration names some.

    Raises:
        ModelError: There is no such model, it is no causal language model with all its weights, or
            the adapter does not fit it or adds tokens to the input.
        DataError: The tokenizer of the folder is broken.
    """
    from lmmono.data.tokenizers import read_tokenizer
    from lmmono.files.processes import best_device
    from lmmono.models.storage import load_model

    if device is not None and device_map is not None:
        raise ModelError(f"want device={device!r} or device_map={device_map!r}, got both")
    folder = model_folder(path, revision)
    model: Any = load_model(
        folder, dtype=dtype, trust_remote_code=trust_remote_code, device_map=device_map
    )
    if adapter is not None:
        model = _merged(model, model_folder(adapter))
    if (folder / "tokenizer.json").is_file():
        model.tokenizer = read_tokenizer(folder)
    return model if device_map is not None else model.to(device or best_device())


def on_best_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model, in place, to the device that this process works on, and return it.

    One that a `device_map` has spread stays as it is.
    """
    from lmmono.files.processes import best_device

    if hasattr(model, "hf_device_map"):
        return model
    moved: Any = model  # transformers' own `to` has a type that no checker can call
    return moved.to(best_device())


def open_section(section: PretrainedModel, seed: int) -> PreTrainedModel:
    """Return the model of a recipe's section, on the CPU or spread, without a tokenizer.

    An untrained one is drawn from the configuration by the seed; other random states stay put.

    Raises:
        ModelError: As `open_model`, or several processes would each spread it.
    """
    from lmmono.files.processes import this_process
    from lmmono.models.storage import initial_model, load_model, spread

    if section.device_map is not None and this_process().n > 1:
        raise ModelError(
            f"model.device_map={section.device_map} spreads one model over all GPUs of a process, "
            f"and {this_process().n} processes were launched; run it without the launcher"
        )
    folder = model_folder(section.path, section.revision)
    if section.untrained:
        model = initial_model(folder, seed=seed, dtype=section.dtype)
        return model if section.device_map is None else spread(model, section.device_map)
    model = load_model(folder, dtype=section.dtype, device_map=section.device_map)
    return model if section.adapter is None else _merged(model, model_folder(section.adapter))


def model_folder(path: Path | str, revision: str | None = None, *, offline: bool = False) -> Path:
    """Return the folder of a model: the path itself, or where the Hub's cache has it.

    Args:
        path: Folder, or a name on the Hugging Face Hub, which is downloaded if it is not there.
        revision: Branch, tag or commit on the Hub.
        offline: Ask the cache alone.

    Raises:
        ModelError: There is no such folder, and no model of that name that can be reached.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{folder}: a folder has no revision {revision!r}; leave it out")
        return folder
    if not is_hub_name(str(path)):
        raise ModelError(
            f"{path}: no such folder; want one that save_pretrained wrote, or a name on the "
            "Hugging Face Hub such as openai-community/gpt2"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from lmmono.models.storage import no_progress_bars

    try:
        with no_progress_bars():
            snapshot = snapshot_download(
                str(path),
                revision=revision,
                allow_patterns=list(_WANTED),
                local_files_only=offline,
            )
        return Path(snapshot)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{path}: no such folder here, and the Hugging Face Hub gives no model of that name "
            f"({type(error).__name__}: {first}); check the name, the revision and the network"
        ) from error


def file_marks(section: PretrainedModel) -> dict[str, FileMark]:
    """Return the digest, size and time of every file that decides the numbers of a model.

    Raises:
        ModelError: There is no such model.
    """
    marks: dict[str, FileMark] = {}
    for name, path in _files(section).items():
        stat = path.stat()
        marks[name] = [file_digest(path), stat.st_size, stat.st_mtime_ns]
    return marks


def changed_files(
    section: PretrainedModel, marks: Mapping[str, FileMark], *, every_byte: bool = False
) -> list[str]:
    """Return one line for each file that is not what it was; reads only those of another time.

    Args:
        section: The model.
        marks: What `file_marks` returned.
        every_byte: Read all files.

    Raises:
        ModelError: There is no such model any more.
    """
    files, faults = _files(section, offline=True), list[str]()
    for name in sorted({*files, *marks}):
        if name not in files:
            faults.append(f"{name} is missing")
        elif name not in marks:
            faults.append(f"{files[name]} is new")
        else:
            digest, size, changed = marks[name]
            stat = files[name].stat()
            is_same = [stat.st_size, stat.st_mtime_ns] == [size, changed] and not every_byte
            if not is_same and file_digest(files[name]) != digest:
                faults.append(f"{files[name]} has other bytes (sha256 differs)")
    return faults


def _files(section: PretrainedModel, *, offline: bool = False) -> dict[str, Path]:
    folder = model_folder(section.path, section.revision, offline=offline)
    patterns = ["config.json"] if section.untrained else _WEIGHTS
    files = {path.name: path for pattern in patterns for path in folder.glob(pattern)}
    if section.adapter is not None and not section.untrained:
        adapter = model_folder(section.adapter, offline=offline)
        names = [path for pattern in _WEIGHTS for path in adapter.glob(pattern)]
        files |= {f"adapter/{path.name}": path for path in names}
    return files


def require_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n_ctx: int) -> None:
    """Refuse a tokenizer with ids that a model does not have, and rows longer than its context.

    Raises:
        ModelError: Says which number has to change.
    """
    config, kind = model.config.get_text_config(), type(model).__name__
    largest = max(tokenizer.get_vocab().values())
    d_vocab = getattr(config, "vocab_size", None)
    if d_vocab is not None and largest >= d_vocab:
        raise ModelError(
            f"data.tokenizer: its ids go up to {largest}, and {kind} knows 0 to {d_vocab - 1}; use "
            "the model's own tokenizer (leave data.tokenizer out)"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and n_ctx > longest:
        raise ModelError(
            f"data.n_ctx: rows of {n_ctx} tokens do not fit the {longest} positions of {kind}; "
            f"set data.n_ctx={longest} or less"
        )


def fit_warnings(
    loss: float,
    tokenizer: PreTrainedTokenizerFast,
    own: PreTrainedTokenizerFast | None,
) -> list[str]:
    """Return what suggests that text or tokenizer are not those that a model knows.

    Args:
        loss: Of the model on held-out text, nats per token.
        tokenizer: The one that is used.
        own: The one in the model's folder, where there is one.
    """
    lines: list[str] = []
    vocabulary = tokenizer.get_vocab()
    if own is not None and own.get_vocab() != vocabulary:
        theirs = own.get_vocab()
        n_other = sum(theirs.get(token) != i for token, i in vocabulary.items())
        lines.append(
            f"data.tokenizer is not the model's own: {n_other:,} of its {len(vocabulary):,} tokens "
            "have another id there, or none"
        )
    chance = math.log(len(vocabulary))
    # weights as they are drawn give chance and a few hundredths; real text under a wrong
    # vocabulary costs a trained model nats more than that
    if loss > chance + 0.5:
        lines.append(
            f"the loss on held-out text is {loss:.2f} nats per token, and guessing among "
            f"{len(vocabulary):,} tokens has {chance:.2f}: the tokenizer is another model's, the "
            "text of a kind that the model does not know, or the weights are not trained"
        )
    return lines


def _merged(model: Any, adapter: Path) -> Any:
    """Return a model with the weights of an adapter merged into its own."""
    try:
        from peft import PeftConfig, PeftModel
    except ModuleNotFoundError:
        raise ModelError(
            f"{adapter}: an adapter is read by peft; install it: pip install 'lmmono[noise]'"
        ) from None
    if not (adapter / "adapter_config.json").is_file():
        raise ModelError(f"{adapter}: no adapter here (want adapter_config.json as PEFT writes it)")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        if config.is_prompt_learning:
            raise ModelError(
                f"{adapter}: adds tokens to every input ({config.peft_type}), which cannot be "
                "merged into weights; use a LoRA adapter"
            )
        with warnings.catch_warnings():  # peft asks transformers 5 for a name it will drop
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as fault:
        raise ModelError(
            f"{adapter}: does not fit {type(model).__name__}: "
            f"{type(fault).__name__}: {str(fault).splitlines()[0]}"
        ) from fault
    return merged.eval()

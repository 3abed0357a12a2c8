"""Dictionaries on the Hugging Face Hub: nothing goes up or comes down unless it is asked for.

Tested with huggingface_hub 2.4 against a local server that speaks its API: creation of the
repository, plain and LFS uploads, commits, listing and download. Not tested against the Hub itself,
nor its Xet transfer, which huggingface_hub uses there by itself.
"""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmono.dictionaries.estimator import WEIGHTS, Dictionary
from lmmono.dictionaries.sae_training import CURVES
from lmmono.errors import DictionaryError
from lmmono.files import provenance
from lmmono.interop.interchange import FILES, import_dictionary

if TYPE_CHECKING:
    from lmmono.dictionaries.evaluation import SAEReport
else:  # for annotations only
    SAEReport = object

CARD = "README.md"


def push_dictionary(
    dictionary: Dictionary,
    repo_id: str,
    *,
    folder: str = "",
    report: SAEReport | None = None,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a dictionary and its model card to the Hub, in one commit.

    The repository is made if it is not there. What is uploaded is what `save` writes without the
    curves of the training, so an SAE is there for sae-lens, too.

    Args:
        dictionary: Any fitted dictionary.
        repo_id: `user/name` or `organization/name`.
        folder: Path in the repository; several dictionaries can share one. The card of a folder
            lies in the folder.
        report: What `lm.evaluate` measured; goes into the card.
        private: Whether a new repository is private; one that is there stays as it is.
        revision: Branch to commit to; None is the main one.
        message: Of the commit.
        endpoint: Address of the Hub; by default what huggingface_hub is set to.
        token: Access token; by default the one huggingface_hub has stored.

    Returns:
        The address of the commit.

    Raises:
        DictionaryError: It is not fitted, or the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token, library_name="lmmono")
    with tempfile.TemporaryDirectory() as scratch:
        path = dictionary.save(Path(scratch) / "dictionary")
        (path / CARD).write_text(card(dictionary, report), encoding="utf-8")
        with _hub_errors(f"push_dictionary: {repo_id}"), _without_progress_bars():
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=path,
                path_in_repo=folder or None,
                ignore_patterns=CURVES,  # the curves of the training stay at home
                revision=revision,
                commit_message=message or f"Add {dictionary!r}",
            )
    return str(commit.commit_url)


def load_from_hub(
    repo_id: str,
    *,
    folder: str = "",
    revision: str | None = None,
    hook: str | None = None,
    scale: float | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    cache: str | Path | None = None,
) -> Dictionary:
    """Download a dictionary from the Hub, of any layout that `import_dictionary` reads.

    Files that were downloaded before are not downloaded again.

    Args:
        repo_id: `user/name` or `organization/name`.
        folder: Path in the repository.
        revision: Branch, tag or commit; None is the main branch.
        hook: Hook whose vectors it codes; by default what its files say.
        scale: As `import_dictionary` takes it.
        endpoint: Address of the Hub; by default what huggingface_hub is set to.
        token: Access token; by default the one huggingface_hub has stored.
        cache: Folder to keep downloads in; by default huggingface_hub's.

    Raises:
        DictionaryError: The Hub cannot be reached or refuses, or there is no dictionary.
    """
    from huggingface_hub import snapshot_download

    prefix = f"{folder.strip('/')}/" if folder else ""
    names = sorted({name for files in FILES.values() for name in files} | {WEIGHTS})
    with _hub_errors(f"load_from_hub: {repo_id}"), _without_progress_bars():
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[prefix + name for name in names],
            endpoint=endpoint,
            token=token,
            cache_dir=cache,
            library_name="lmmono",
        )
    path = Path(snapshot) / prefix
    if not path.is_dir():
        raise DictionaryError(
            f"load_from_hub: {repo_id}: no dictionary in {prefix or 'its first folder'}; give the "
            "folder that has one, folder=..."
        )
    return import_dictionary(path, hook=hook, scale=scale)


def card(dictionary: Dictionary, report: SAEReport | None = None) -> str:
    """Return a model card: hook, settings and what was measured, nothing else."""
    network = getattr(dictionary, "network", None)
    library = "saelens" if network is not None else "lmmono"
    facts = {
        "hook": dictionary.hook or "not known",
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "seed": dictionary.seed,
        **dictionary.settings.model_dump(mode="json", exclude_none=True),
    }
    load = 'lmmono.load_from_hub("<this repository>")'
    lines = ["---", f"library_name: {library}", "tags: [lmmono, sparse-autoencoder]", "---"]
    lines += [f"# {dictionary.arch} dictionary of {facts['hook']}", "", f"    {load}", ""]
    lines += ["## Settings", "", *_table(facts)]
    if dictionary.facts:
        lines += ["", "## The fit says of itself", "", *_table(dictionary.facts)]
    if report is not None:
        lines += ["", "## Measured", "", *_measured(report)]
    lines += ["", "## Versions", "", *_table(provenance.versions())]
    return "\n".join(lines) + "\n"


def _table(facts: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value is not None]
    return ["| | |", "|---|---|", *rows]


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _measured(report: SAEReport) -> list[str]:
    """Return a table of the report's numbers with their intervals."""
    lines = [
        f"On {report.n_tokens:,} tokens of {report.n_documents:,} {report.split} documents.",
        "",
        "| metric | of | value | low | high | level of the interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.rows():
        numbers = [row.get(name) for name in ("value", "ci_low", "ci_high", "ci_level")]
        cells = ["" if number is None else _cell(float(number)) for number in numbers]
        lines.append(f"| {row['metric']} | {row['preset'] or ''} | {' | '.join(cells)} |")
    return lines


@contextmanager
def _hub_errors(what: str) -> Generator[None]:
    """Raise what the Hub, the network or the name refuses as a `DictionaryError`."""
    from huggingface_hub import errors

    transport = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    except (transport, OSError, ValueError, RuntimeError) as error:
        reason = f"{error} {error.__cause__ or ''}"  # an upload that failed says why in its cause
        raise DictionaryError(
            f"{what}: {' '.join(reason.split())} Check the name, the token and its rights, the "
            "revision and the network"
        ) from error


@contextmanager
def _without_progress_bars() -> Generator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()

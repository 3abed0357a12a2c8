"""A run folder: the resolved recipe, what was done to get here, and where everything lies.

    runs/x/recipe.yaml       the recipe with every default written out
           manifest.json     commit, versions, machine, and a record of every stage
           metrics.parquet   numbers of training
           model/            weights and tokenizer; a pretrained model stays where it is
           store.duckdb      the activation store, with its shards in store/
           dictionaries/     <hook>/<name>/, learned from vectors.duckdb
           robustness/       figures of the robustness suites
           untrained/        its untrained control, a run folder like this one
           steps/            the models of kept steps, a run folder each
           replaced/         what other settings made, each a run folder of its own

What a stage made with other settings is never reused and never deleted: it moves to `replaced/`;
rows of explanations and scores stay in the store, under the names of their settings.
Only one process at a time works in a folder.
"""

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmono.errors import ModelError, RecipeError, RunError, nearest
from lmmono.files import provenance
from lmmono.files.atomic import atomic_folder, disk_faults, remove_folder, write_atomic
from lmmono.files.digests import damaged_files, file_digest, folder_digests
from lmmono.files.locks import lock_folder
from lmmono.recipe import SECTIONS, Recipe
from lmmono.recipe.sections import Data, FolderTokenizer, ModelTokenizer, PretrainedModel
from lmmono.runs.manifest import Manifest, StageRecord
from lmmono.runs.stages import STAGES, Stage
from lmmono.types import Split

if TYPE_CHECKING:
    from pyarrow import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from activation_store import Store
    from lmmono.data.tokens import TokenCorpus, TokenRows
else:  # for annotations only: importing these takes seconds, and listing runs needs none of them
    PreTrainedModel = PreTrainedTokenizerFast = Store = Table = TokenCorpus = TokenRows = object


_RECIPE_HEAD = "# The recipe of this run, with every default written out."


class Run:
    """An opened run folder; models, tokens and tables are read when first asked for."""

    def __init__(self, folder: Path, recipe: Recipe, manifest: Manifest) -> None:
        self.dir = folder
        self.recipe = recipe
        self.manifest = manifest
        self._whole = set[str]()
        self._store: Store | None = None
        self.set_aside: Path | None = None
        """Where `create` put what other settings had made here; None if there was nothing."""

    @classmethod
    def create(cls, recipe: Recipe, folder: Path | None = None) -> "Run":
        """Open the run folder of a recipe, made now if there is none.

        Args:
            recipe: One run.
            folder: The run folder, where it is not that of the recipe's `out` and `name`: a run
                may have been moved.

        A stage that was begun here with other settings is not reused, nor are those that build on
        it, and none is deleted: they move to `replaced/`, with the recipe and the manifest that
        made them, where they can be opened as a run. Stages whose settings are the same stay.

        Raises:
            RecipeError: The recipe stands for several runs.
            RunError: The folder holds something else than a run, another process works in it, or
                it cannot be written.
        """
        recipe = recipe.only()
        folder = folder or recipe.dir
        if not _holds_something(folder):
            run = cls(folder, recipe, Manifest.new(recipe))
            run._write()
            return run
        run = open_run(folder)
        if run.recipe != recipe:
            with lock_folder(folder):
                run._adopt(recipe)
        return run

    def __repr__(self) -> str:
        files = (path.stat().st_size for path in self.dir.rglob("*") if path.is_file())
        return f"Run({self.dir}, {sum(files) / 1e6:.1f} MB)"

    @property
    def name(self) -> str:
        """The name shown to people: that of the recipe, in a study with the run's folder."""
        return "/".join(filter(None, (self.recipe.name, self.recipe.folder)))

    @property
    def store_path(self) -> Path:
        """Where the activation store lies, or will lie."""
        return self.dir / "store.duckdb"

    @contextmanager
    def reading(self) -> Generator[Store]:
        """Give the activation store, open for reading: the same one to who asks within.

        To open a store takes longer than most of what a report asks of it.

        Raises:
            StoreError: It cannot be opened.
        """
        import activation_store

        if self._store is not None:
            yield self._store
            return
        with activation_store.open(self.store_path) as self._store:
            try:
                yield self._store
            finally:
                self._store = None

    @property
    def val_loss(self) -> float:
        """Loss on held-out documents, after training where there is one, nats per token.

        Raises:
            RunError: Training has not finished, or the pretrained model was not opened yet.
        """
        record = self.manifest.stages.get(self.model_stage)
        if record is None or record.state != "finished":
            raise RunError(f"{self.dir}: no loss measured yet; {self._model_first()}")
        return float(record.facts["val_loss"])  # pyright: ignore[reportArgumentType]

    @cached_property
    def metrics(self) -> Table:
        """The numbers of training, as `metrics.parquet` holds them.

        Raises:
            RunError: There are none yet, or they are damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.dir / "metrics.parquet"
        if not path.is_file():
            raise RunError(f"{path}: no such file; {self._model_first()}")
        try:
            # `read_table` imports pandas, which takes longer than all else that lists a run
            with pq.ParquetFile(path) as file:
                return file.read()
        except (OSError, pa.ArrowException) as fault:
            raise RunError(
                f"{path}: damaged: {str(fault).splitlines()[0]}; bring the file back"
            ) from fault

    @cached_property
    def model(self) -> PreTrainedModel:
        """The trained or pretrained model, in evaluation mode, with its tokenizer.

        Raises:
            RunError: There is none yet, or the pretrained one is another than it was.
            ModelError: It cannot be read.
        """
        from lmmono.models.pretrained import open_section
        from lmmono.models.storage import load_model

        if isinstance(self.recipe.model, PretrainedModel):
            self.require_same_model()
            model = open_section(self.recipe.model, self.recipe.seed)
        elif not (self.dir / "model").is_dir():
            raise RunError(f"{self.dir}: holds no model yet; {self._model_first()}")
        else:
            self.require_whole("train")
            model = load_model(self.dir / "model")
        # so that hooks take text too; torch types attributes as tensors and modules only
        model.tokenizer = self.tokenizer  # pyright: ignore[reportArgumentType]
        return model

    @cached_property
    def corpus(self) -> TokenCorpus:
        """The prepared corpus; made now if the runs' cache does not hold it.

        Raises:
            DataError: The text cannot be read, or is too small.
        """
        from lmmono.data.tokens import prepare

        return prepare(self._data, self.cache_dir / "data")

    @property
    def _data(self) -> Data:
        """The settings of the text, with the folder of the tokenizer where it is the model's."""
        from lmmono.models.pretrained import model_folder

        data, model = self.recipe.data, self.recipe.model
        if not (isinstance(data.tokenizer, ModelTokenizer) and isinstance(model, PretrainedModel)):
            return data
        tokenizer = FolderTokenizer(
            kind="folder", path=str(model_folder(model.path, model.revision))
        )
        return data.model_copy(update={"tokenizer": tokenizer})

    @property
    def model_stage(self) -> str:
        """The stage that brings the model: `train`, or `open` for a pretrained one."""
        return "open" if self.recipe.is_pretrained else "train"

    @property
    def model_facts(self) -> dict[str, Any]:
        """What the manifest says of the model; nothing before the model is there."""
        record = self.manifest.stages.get(self.model_stage)
        return dict(record.facts) if record else {}

    @property
    def warnings(self) -> list[str]:
        """What suggests that model and text do not fit; what a capture leaves out."""
        capture = self.manifest.stages.get("capture")
        facts: tuple[dict[str, Any], ...] = (
            self.model_facts,
            dict(capture.facts) if capture else {},
        )
        return [str(line) for fact in facts for line in fact.get("warnings", [])]

    @property
    def cache_dir(self) -> Path:
        """Prepared corpora: $LMMONO_CACHE, or `.cache` in the folder of the runs."""
        if shared := os.environ.get("LMMONO_CACHE"):
            return Path(shared)
        for folder in self.dir.absolute().parents[:2]:  # a control or a kept step inside its run
            if (folder / "manifest.json").is_file():
                return open_run(folder).cache_dir
        return (self.dir.parent.parent if self.recipe.folder else self.dir.parent) / ".cache"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer: of the model, and before there is one, of the corpus.

        Raises:
            DataError: The model's is broken.
        """
        from lmmono.data.tokenizers import build_tokenizer, read_tokenizer

        if self.recipe.is_pretrained:
            data = self._data
            return build_tokenizer(data.tokenizer, data.corpus, data.splits)
        if not (self.dir / "model" / "tokenizer.json").is_file():
            return self.corpus.tokenizer
        tokenizer = read_tokenizer(self.dir / "model")
        # long texts are cut into rows here, so no word of warning about them
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = (
            True
        )
        return tokenizer

    def tokens(self, split: Split) -> TokenRows:
        """Return the token rows of a split.

        Raises:
            DataError: The split has no whole row.
        """
        return self.corpus.tokens(split)

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        """Write model and tokenizer to `model/`: it appears when it is whole.

        Raises:
            RunError: The folder cannot be written; an older model is still there.
        """
        from lmmono.models.storage import no_progress_bars

        # so that truncation=True cuts at the context; the corpus' own tokenizer stays unlimited
        limited = copy(tokenizer)
        limited.model_max_length = model.config.max_position_embeddings
        with atomic_folder(self.dir / "model") as fresh, no_progress_bars():
            model.save_pretrained(fresh)
            limited.save_pretrained(fresh)

    def is_done(self, stage: str) -> bool:
        """Say whether a stage of `STAGES` has succeeded with this run's settings."""
        record = self.manifest.stages.get(stage)
        digest = self.recipe.digest(*STAGES[stage].sections)
        return record is not None and record.state == "finished" and record.digest == digest

    @contextmanager
    def stage(self, name: str) -> Generator[dict[str, Any], None, None]:
        """Work on a stage: it counts as finished when the block ends without an exception.

        The folder is locked meanwhile. Time and memory are recorded also where the block fails.

        Yields:
            Facts for the manifest, to be filled in the block; values that JSON can hold.

        Raises:
            RunError: Another process works in the folder, or it cannot be written.
        """
        with lock_folder(self.dir):
            self.manifest = Manifest.read(self.dir)  # an earlier process may have added stages
            digest = self.recipe.digest(*STAGES[name].sections)
            record = StageRecord.begin(digest, self.manifest.stages.get(name))
            self._record(name, record)
            provenance.reset_peak_memory()
            began, facts = time.monotonic(), dict[str, Any]()
            try:
                yield facts
            except BaseException:
                with suppress(RunError):  # the reason of the failure matters more than its record
                    self._record(name, record.after(began))
                raise
            done = {"state": "finished", "facts": facts, "files": self._digests(STAGES[name].makes)}
            self._record(name, StageRecord.model_validate({**dict(record.after(began)), **done}))

    def undo(self, name: str) -> None:
        """Remove what a stage has made, so that it and those that build on it are done again.

        Raises:
            RunError: Another process works in the folder, or it cannot be written.
        """
        with lock_folder(self.dir), disk_faults(self.dir):
            self.manifest = Manifest.read(self.dir)
            gone = {name, *(n for n, stage in STAGES.items() if name in stage.below)}
            stages = {n: record for n, record in self.manifest.stages.items() if n not in gone}
            self.manifest = self.manifest.model_copy(update={"stages": stages, "earlier": ()})
            self.manifest.write(self.dir)
            for product in STAGES[name].makes:
                path = self.dir / product
                remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _digests(self, makes: Sequence[str]) -> dict[str, str]:
        """Return the digests of what a stage has made; stores and runs inside have their own."""
        stores = {name.removesuffix(".duckdb") for name in makes if name.endswith(".duckdb")}
        digests: dict[str, str] = {}
        for name in makes:
            path = self.dir / name
            has_own = name.partition(".")[0] in stores or any(path.glob("*/manifest.json"))
            if has_own or not path.exists():
                continue
            inner = folder_digests(path) if path.is_dir() else {"": file_digest(path)}
            digests |= {f"{name}/{rest}".rstrip("/"): digest for rest, digest in inner.items()}
        return digests

    def require_whole(self, stage: str) -> None:
        """Check the bytes of what a stage has made, once for each opened run.

        Raises:
            RunError: A file is missing or has changed; names each.
        """
        if stage in self._whole or stage not in self.manifest.stages:
            return
        if faults := damaged_files(self.dir, self.manifest.stages[stage].files):
            products = [name for name in STAGES[stage].makes if (self.dir / name).exists()]
            way_out = (
                f"{self.dir}: bring the files back, or make them again: remove "
                f"{' and '.join(products) or 'nothing'}, and {stage!r} from manifest.json, then "
                f"run `lmmono run {self.dir}`"
            )
            raise RunError("\n".join([*faults, way_out]))
        self._whole.add(stage)

    def require_same_model(self, *, every_byte: bool = False) -> None:
        """Refuse a pretrained model whose files are not those that the run was begun with.

        Files of the same size and time are taken as the same, unless `every_byte` is asked for.

        Raises:
            RunError: A file has changed, came or went; names each.
            ModelError: The model is not there any more, and every byte is asked for.
        """
        marks = self.model_facts.get("weights")
        if not (isinstance(self.recipe.model, PretrainedModel) and marks):
            return
        from lmmono.models.pretrained import changed_files

        try:
            faults = changed_files(self.recipe.model, marks, every_byte=every_byte)
        except ModelError:
            if every_byte:
                raise
            return  # results stand without the model, and who needs it is told by opening it
        if faults:
            raise RunError(
                f"{self.dir}: holds results of another model than {self.recipe.model.path} is now: "
                f"{'; '.join(faults)}; give the new model's run another name or out, or bring the "
                "old files back"
            )

    def text_facts(self, stage: Stage) -> dict[str, Any]:
        """Return the fact of which text files a stage is about to read, if it reads any.

        Raises:
            DataError: A file is missing or cannot be read.
        """
        from lmmono.runs.source_texts import named_texts, text_marks

        paths = named_texts(self.recipe, stage.reads)
        return {"texts": text_marks(paths)} if paths else {}

    def require_same_texts(self) -> None:
        """Refuse text files that are not those which finished stages have read.

        Raises:
            RunError: A file has changed, came or went; names each.
        """
        for name, record in self.manifest.stages.items():
            marks: Any = record.facts.get("texts")
            if record.state != "finished" or not marks or not self.is_done(name):
                continue
            if not isinstance(marks, dict) or any(
                not isinstance(mark, list) or len(mark) != 3 for mark in marks.values()
            ):
                raise RunError(
                    f"{self.dir / 'manifest.json'}: stages.{name}.facts.texts: want digest, size "
                    "and time of each file; bring the manifest back as it was written"
                )
            from lmmono.runs.source_texts import changed_texts, named_texts

            if faults := changed_texts(named_texts(self.recipe, STAGES[name].reads), marks):
                raise RunError(
                    f"{self.dir}: stage {name} has read other text than there is now: "
                    f"{'; '.join(faults)}; give the new text's run another name or out, or bring "
                    "the old files back"
                )

    def _record(self, name: str, record: StageRecord) -> None:
        stages = {**self.manifest.stages, name: record}
        self.manifest = self.manifest.model_copy(update={"stages": stages})
        self.manifest.write(self.dir)

    def _adopt(self, recipe: Recipe) -> None:
        """Take other settings; what they would make otherwise is set aside.

        Explanations and scores stay in the store, where others lie beside them: what was finished
        with settings that come back is finished, unless the store was set aside since.
        """
        stages, stale = self.manifest.stages, self.manifest.stale_stages(recipe)
        replaced = {name for name in stale if not STAGES[name].is_additive}
        digest = self.manifest.recipe_digest[:8]
        n_taken = len(list((self.dir / "replaced").glob(f"{digest}*")))
        aside = self.dir / "replaced" / (f"{digest}-{n_taken + 1}" if n_taken else digest)
        if replaced:
            Run(aside, self.recipe, self.manifest)._write()
            self.set_aside = aside
        left = [
            (n, stages[n]) for n in stale if n not in replaced and stages[n].state == "finished"
        ]
        earlier = {
            (name, record.digest): record
            for name, record in (*self.manifest.earlier, *left)
            if replaced.isdisjoint(STAGES[name].below)
        }
        kept = {name: record for name, record in stages.items() if name not in stale}
        for name in STAGES:
            key = (name, recipe.digest(*STAGES[name].sections))
            if name not in kept and key in earlier:
                kept[name] = earlier.pop(key)
        update: dict[str, Any] = {
            "stages": kept,
            "earlier": tuple((n, r) for (n, _), r in earlier.items()),
        }
        if kept:  # what is there was made under the claims of then
            update["registered"] = self.manifest.registered
        self.recipe, self.manifest = recipe, Manifest.new(recipe).model_copy(update=update)
        self._write()
        # after the manifest: a crash here leaves files that nobody counts on, not a record of
        # files that are gone
        with disk_faults(aside):
            for product in (product for name in stale for product in STAGES[name].makes):
                if (self.dir / product).exists():
                    (self.dir / product).replace(aside / product)

    def _write(self) -> None:
        with disk_faults(self.dir):
            self.dir.mkdir(parents=True, exist_ok=True)
        write_atomic(self.dir / "recipe.yaml", _resolved_yaml(self.recipe))
        # last, because a folder counts as a run when it has a manifest
        self.manifest.write(self.dir)

    def _model_first(self) -> str:
        verb = STAGES[self.model_stage].verb or self.model_stage
        return f"run `lmmono {verb} {self.dir / 'recipe.yaml'}` first"


def open_run(path: str | Path) -> Run:
    """Open a run folder.

    Raises:
        RunError: There is no such folder, it is no run folder, or it is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run folder; {_nearby(folder)}")
    if not (folder / "manifest.json").is_file():
        if inner := find_runs(folder):
            names = ", ".join(map(str, inner))
            raise RunError(f"{folder}: holds several runs; name one: {names}")
        raise RunError(f"{folder}: no run folder (it has no manifest.json); {_nearby(folder)}")
    manifest = Manifest.read(folder)
    try:
        recipe = Recipe.load(folder / "recipe.yaml")
    except RecipeError as error:
        raise RunError(f"{folder}: its recipe cannot be read:\n{error}") from None
    return Run(folder, recipe, manifest)


def find_runs(folder: str | Path) -> list[Path]:
    """Return the run folders at or under a folder, at most two levels down, sorted."""
    root = Path(folder)
    patterns = ("manifest.json", "*/manifest.json", "*/*/manifest.json")
    paths = {path.parent for pattern in patterns for path in root.glob(pattern)}
    # a run inside a run is part of it: its untrained control, or what was set aside in replaced/
    return sorted(p for p in paths if not {p.parent, p.parent.parent} & paths)


def _nearby(folder: Path) -> str:
    runs = [str(path) for path in find_runs(folder.parent)] if folder.parent.is_dir() else []
    return nearest(str(folder), runs) if runs else "`lmmono run RECIPE` makes one"


def _holds_something(folder: Path) -> bool:
    """Say whether anything but a run whose making was cut short is there."""
    if not folder.is_dir():
        return folder.exists()
    recipe = folder / "recipe.yaml"
    ours = recipe.is_file() and recipe.read_bytes().startswith(_RECIPE_HEAD.encode())
    started = {"recipe.yaml"} if ours else set[str]()
    started |= {"recipe.yaml.tmp", "manifest.json.tmp"}
    return any(path.name not in started for path in folder.iterdir())


def changes(before: Recipe, now: Recipe) -> list[str]:
    """Return what differs between two recipes' results, as `train.lr: 0.002 before, 0.001 now`."""
    old, new = (
        dict(_leaves(r.model_dump(mode="json", include={"seed", *SECTIONS}))) for r in (before, now)
    )
    return [
        f"{key}: {old.get(key, 'absent')} before, {new.get(key, 'absent')} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _leaves(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value


def _resolved_yaml(recipe: Recipe) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    text = StringIO()
    unset = {"seeds", "arms"} | ({"arm", "folder"} if recipe.folder is None else set())
    unset |= {"train"} if recipe.is_pretrained else set()
    yaml.dump(recipe.model_dump(mode="json", exclude=unset), text)
    return f"{_RECIPE_HEAD}\n{text.getvalue()}"

"""A recipe: everything that decides what a run does, and its JSON Schema.

Reading one from a file stands on top of this, in `lmmono.recipe.load`.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from lmmono.errors import RecipeError
from lmmono.files.docstrings import field_sentences
from lmmono.recipe.dictionary_settings import Dictionaries
from lmmono.recipe.explain_settings import Explain, Score, unexplained_clash
from lmmono.recipe.robustness_settings import Robustness
from lmmono.recipe.section import Section, clash
from lmmono.recipe.sections import (
    Capture,
    Data,
    Model,
    ModelTokenizer,
    PretrainedModel,
    Sweep,
    Train,
)
from lmmono.registry.lookup import load

Schema = dict[str, Any]
"""A JSON Schema, or a part of one."""

SECTIONS = ("data", "model", "train", "capture", "dictionary", "explain", "score", "robustness")
"""Keys that arms may change and digests may cover, in the order of the stages."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _seed_or_seeds(schema: dict[str, Any]) -> None:
    schema["required"].remove("seed")
    schema["oneOf"] = [{"required": ["seed"]}, {"required": ["seeds"]}]


class Recipe(Section, json_schema_extra=_seed_or_seeds):
    """One run, or a study: every arm with every seed, one run folder each.

    A recipe is complete without its arms; each arm changes some of its settings. In a file give
    `seed` or `seeds`, not both.
    """

    name: Name
    """Name of the run or study: its folder under `out`."""
    about: str = ""
    """What the recipe is for, in free text; changes no hash."""
    seed: Seed
    """Seed of everything random in a run; a study with `seeds` shows their first here."""
    seeds: tuple[Seed, ...] = ()
    """Seeds of a study: every arm is run once with each."""
    out: str = "runs"
    """Folder that holds the run folders; prepared corpora in its `.cache`, or $LMMONO_CACHE."""
    data: Data = Field(default_factory=Data)
    """Text and tokens."""
    model: Model
    """The model, by its `arch`."""
    train: Train = Field(default_factory=Train)
    """Training."""
    capture: Capture = Field(default_factory=Capture)
    """What goes into the store."""
    dictionary: Dictionaries = Field(default_factory=Dictionaries)
    """Dictionaries to learn; none by default."""
    explain: Explain = Field(default_factory=Explain)
    """Explanations of units; none by default."""
    score: Score = Field(default_factory=Score)
    """Scores of units and of their explanations."""
    robustness: Robustness = Field(default_factory=Robustness)
    """Tasks made harder, and which codes serve best then; none by default."""
    sweep: Sweep = Field(default_factory=Sweep)
    """Learning rates to try for every arm before its runs; none by default."""
    registered: str | None = None
    """File of what is claimed before the run (`lmmono.recipe.registration`); its sha256 goes into
    the manifest when the run begins, so a claim that changed later is known."""
    arms: dict[Name, dict[str, Any]] = {}
    """Named changes, one run each: dotted keys (`model.arch: gpt2`) or whole sections."""
    arm: Name | None = None
    """The arm to run, of `arms`; in a run's own recipe, the arm that it is."""
    folder: Name | None = None
    """Folder of a study's run under the study's; lmmono writes it, recipes leave it out."""

    @model_validator(mode="before")
    @classmethod
    def _take_first_seed(cls, values: Any) -> Any:
        seeds = values.get("seeds") if isinstance(values, dict) else None
        if isinstance(seeds, tuple) and seeds and "seed" not in values:
            return {**values, "seed": seeds[0]}
        return values

    @model_validator(mode="before")
    @classmethod
    def _settle_pretrained(cls, values: Any) -> Any:
        """Let a pretrained model bring its tokenizer, and an arm of one leave out training."""
        if not isinstance(values, dict):
            return values
        model = values.get("model")
        arch = model.get("arch") if isinstance(model, dict) else getattr(model, "arch", None)
        if arch != "pretrained":
            return values
        data = values.get("data", {})
        if isinstance(data, dict) and "tokenizer" not in data:
            values = {**values, "data": {**data, "tokenizer": {"kind": "model"}}}
        elif isinstance(data, Data) and "tokenizer" not in data.model_fields_set:
            own = {"tokenizer": ModelTokenizer(kind="model")}
            values = {**values, "data": data.model_copy(update=own)}
        if values.get("arm"):  # the settings stand outside the arms, for those that are trained
            values = {key: value for key, value in values.items() if key != "train"}
        return values

    @model_validator(mode="after")
    def _fit_model(self) -> "Recipe":
        kind = self.data.tokenizer.kind
        if not self.is_pretrained:
            if isinstance(self.data.tokenizer, ModelTokenizer):
                message = "only a pretrained model has a tokenizer of its own; want words or bpe"
                raise clash(message, "data.tokenizer", "model.arch")
            return self
        if kind in ("words", "bpe"):
            message = (
                f"a {kind} tokenizer is made from the text, and a pretrained model knows its own "
                "tokens; leave data.tokenizer out, or name a folder"
            )
            raise clash(message, "data.tokenizer", "model.arch")
        if "train" in self.model_fields_set:
            message = "a pretrained model is not trained; leave train out"
            raise clash(message, "train", "model.arch")
        return self

    @model_validator(mode="after")
    def _fit_sweep(self) -> "Recipe":
        steps = self.sweep.steps
        if self.sweep.lr and self.is_pretrained:
            raise clash("a pretrained model is not trained; leave sweep out", "sweep.lr")
        if self.sweep.lr and steps is not None and steps <= self.train.warmup_steps:
            message = f"want more than train.warmup_steps ({self.train.warmup_steps}), got {steps}"
            raise clash(message, "sweep.steps", "train.warmup_steps")
        return self

    @model_validator(mode="after")
    def _fit_rows(self) -> "Recipe":
        if not self.is_pretrained and (fault := row_clash(self.data, self.train)):
            raise fault
        if fault := unexplained_clash(self.explain, self.score):
            raise fault
        if len(set(self.seeds)) < len(self.seeds):
            raise clash("want every seed once", "seeds")
        return self

    @classmethod
    def load(cls, path: str | Path | None, *overrides: str) -> "Recipe":
        """Read a recipe file; an override `train.steps=500` changes one setting of it.

        A bare name such as `quickstart` is a recipe that comes with lmmono, if there is no such
        file. None takes the shipped recipe `pretrained`, to which overrides bring a model and a
        text: `Recipe.load(None, "model.path=./my-model", "data.corpus.paths=[texts/*.txt]")`; its
        name is the model's.

        Overrides win over arms. An arm that itself sets an overridden key to another value is not
        run: `model.arch=crate` leaves only the arms that are CRATE models; `arm=crate` leaves that
        arm. `seed=1` or `seeds=[1, 2]` replaces the file's seed or seeds. If one run is left, its
        own recipe is returned, arm and all.

        Raises:
            RecipeError: With every fault of the file and the overrides, one line each.
        """
        return load("lmmono.recipe.load:load_recipe")(path, overrides)

    @classmethod
    def check(cls, path: str | Path | None, *overrides: str) -> tuple["Recipe", ...]:
        """Return the recipes of the runs of a file, as `load`, if the files that it names exist.

        Raises:
            RecipeError: With every fault of the file, the overrides, and what is missing.
        """
        recipe = load("lmmono.recipe.load:load_recipe")(path, overrides, with_files=True)
        return recipe.runs()

    def runs(self) -> tuple["Recipe", ...]:
        """Return the recipe of each run: every arm with every seed; a single run is itself.

        Raises:
            RecipeError: An arm changes the recipe into one that cannot be run.
        """
        if not self.arms and not self.seeds:
            return (self,)
        return load("lmmono.recipe.load:runs_of")(self)

    def only(self) -> "Recipe":
        """Return the recipe of the only run.

        Raises:
            RecipeError: There are several.
        """
        runs = self.runs()
        if len(runs) != 1:
            names = ", ".join(str(run.folder) for run in runs)
            message = f"want one run, got {len(runs)} ({names}); say arm=... or seed=..."
            raise RecipeError([f"recipe {self.name}: {message}"])
        return runs[0]

    @property
    def is_pretrained(self) -> bool:
        """Whether the model comes as it is, and nothing is trained."""
        return isinstance(self.model, PretrainedModel)

    @property
    def has_learned(self) -> bool:
        """Whether the model knows anything: it has taken a training step, here or elsewhere."""
        if isinstance(self.model, PretrainedModel):
            return not self.model.untrained
        return self.train.last_step > 0

    @property
    def dir(self) -> Path:
        """The run folder: `out/name`, or `out/name/folder` in a study."""
        return Path(self.out, self.name, self.folder or "")

    def digest(self, *parts: str) -> str:
        """Return the SHA-256 (hex) of the seed and some parts, defaults included.

        Args:
            parts: Sections, or settings of one, such as `dictionary.hooks`.
        """
        assert not self.seeds, "a digest is of one run: take it of each of runs()"
        whole = self.model_dump(mode="json")
        values = {part: reduce(getitem, part.split("."), whole) for part in ("seed", *parts)}
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def row_clash(data: Data, train: Train) -> PydanticCustomError | None:
    """Return the fault of a batch that is no whole number of rows, if it is one."""
    for field in ("batch_tokens", "micro_batch_tokens"):
        n_tokens = getattr(train, field)
        if n_tokens is not None and n_tokens % data.n_ctx:
            message = f"want a multiple of data.n_ctx ({data.n_ctx}), got {n_tokens}"
            return clash(message, f"train.{field}", "data.n_ctx")
    return None


@cache
def recipe_schema() -> Schema:
    """Return the JSON Schema that recipes are checked against."""
    return Recipe.model_json_schema()


def schema_text() -> str:
    """Return the schema for editors, `recipes/recipe.schema.json`: arms know every dotted key."""
    root = _with_sentences(recipe_schema())
    properties = dict(root["properties"])
    arm = {"type": "object", "properties": _arm_keys(root), "additionalProperties": False}
    ((pattern, _),) = properties["arms"]["patternProperties"].items()
    properties["arms"] = {**properties["arms"], "patternProperties": {pattern: arm}}
    draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**draft, **root, "properties": properties}, indent=2) + "\n"


def _with_sentences(root: Schema) -> Schema:
    """Return the schema with the sentence of every field as its description."""
    kinds: dict[str, type[Section]] = {}
    left: list[type[Section]] = [Section]
    while left:
        kind = left.pop()
        kinds[kind.__name__] = kind
        left += kind.__subclasses__()
    whole = copy.deepcopy(root)
    for name, schema in {**whole["$defs"], "Recipe": whole}.items():
        sentences = field_sentences(kinds[name]) if name in kinds else {}
        for key, value in schema.get("properties", {}).items():
            if key in sentences and "description" not in value:
                value["description"] = sentences[key]
    return whole


def resolve(schema: Schema, root: Schema) -> Schema:
    """Follow a `$ref` of the root's definitions."""
    reference = str(schema.get("$ref", ""))
    return root["$defs"][reference.rpartition("/")[2]] if reference else schema


def _arm_keys(root: Schema) -> Schema:
    """Return what an arm may set; a key that several kinds have takes what any of them takes."""
    keys: dict[str, list[Schema]] = {}
    for section in SECTIONS:
        for key, schema in _dotted(section, root, root):
            keys.setdefault(key, []).append(schema)
    return {
        key: schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        for key, schemas in keys.items()
    }


def _dotted(path: str, above: Schema, root: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield every key at and under a section that an arm may set, with its schema."""
    schema: Schema = above["properties"][path.rpartition(".")[2]]
    yield path, {key: value for key, value in schema.items() if key != "default"}
    for kind in schema.get("oneOf", [schema]):
        section = resolve(kind, root)
        for key in section.get("properties", ()):
            yield from _dotted(f"{path}.{key}", section, root)

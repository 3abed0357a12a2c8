"""The settings of a run: one frozen class per stage, a sentence under each field.

Holds no torch and reads no file: `lmmono check` answers from here in under a second.
Choices between kinds are tags (`kind`, `arch`), never class paths.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lmmono.recipe.objective_settings import AnyObjective, raise_equal_names
from lmmono.recipe.section import Count, Fraction, Section, clash
from lmmono.types import Split


def _heads_divide_width(model: "CrateModel | Gpt2Model") -> None:
    if model.d_model % model.n_heads:
        raise clash(
            f"want a divisor of d_model ({model.d_model}), got {model.n_heads}",
            "n_heads",
            "d_model",
        )


class PlantedCorpus(Section):
    """A generated language whose every token has known features; needs no download."""

    kind: Literal["planted"] = "planted"
    n_documents: Count = 20_000
    """Documents to generate."""
    language_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the language and its documents; the run's own seed does not change the text."""


class FilesCorpus(Section):
    """Local `.txt`, `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` files, plain or `.gz`/`.zst`.

    A folder that `datasets` wrote with `save_to_disk` counts as a file.
    """

    kind: Literal["files"]
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders or globs; relative ones are relative to the working folder."""
    text_column: str | None = None
    """Column or JSON key of a document's text; null takes `text`, or the only one of text."""
    split: Literal["auto", "file", "line", "blank_line"] = "auto"
    """What of a `.txt` file is a document; `auto` takes what fits the files, and says which."""
    max_documents: Count | None = None
    """Stop after this many documents; null reads all."""


class HubCorpus(Section):
    """A Hugging Face dataset by name or folder, read through `datasets`."""

    kind: Literal["hub"]
    name: str
    """Dataset name or local folder, as `datasets.load_dataset` takes it."""
    config: str | None = None
    """Dataset configuration, where it has several."""
    split: str = "train"
    """The dataset's own split to read; lmmono makes its splits by document."""
    text_column: str | None = None
    """Column that holds a document's text; null takes `text`, or the only one of text."""
    streaming: bool = True
    """Read as a stream instead of preparing the whole dataset on disk."""
    max_documents: Count | None = None
    """Stop after this many documents; null reads all."""


Corpus = Annotated[PlantedCorpus | FilesCorpus | HubCorpus, Field(discriminator="kind")]


class WordTokenizer(Section):
    """One token per word of the corpus; fits `planted`, where truth is known per word."""

    kind: Literal["words"] = "words"


class BpeTokenizer(Section):
    """A byte-level BPE trained on the corpus' training documents."""

    kind: Literal["bpe"]
    d_vocab: Annotated[int, Field(ge=257)] = 4096
    """Vocabulary size, the 256 bytes and the end-of-text token included."""


class FolderTokenizer(Section):
    """A tokenizer folder as `save_pretrained` writes it, or GPT-2's vocabulary and merges."""

    kind: Literal["folder"]
    path: str
    """Folder with `tokenizer.json`, or with GPT-2's two files (`encoder.json`, `vocab.bpe`)."""


class ModelTokenizer(Section):
    """The tokenizer in a pretrained model's own folder; the default there."""

    kind: Literal["model"]


Tokenizer = Annotated[
    WordTokenizer | BpeTokenizer | FolderTokenizer | ModelTokenizer, Field(discriminator="kind")
]


class Splits(Section):
    """Shares of documents, drawn once by a hash of each document's text; the rest is `train`."""

    val_fraction: Fraction = 0.05
    """Documents for the loss on held-out text."""
    explain_fraction: Fraction = 0.05
    """Documents from which explanations may be made."""
    score_fraction: Fraction = 0.05
    """Documents on which explanations are scored; no explanation ever sees one."""

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> "Splits":
        held_out = self.val_fraction + self.explain_fraction + self.score_fraction
        if held_out > 1.0:
            raise clash(
                f"want val + explain + score fractions of 1 at most, got {held_out:g}",
                "val_fraction",
                "explain_fraction",
                "score_fraction",
            )
        return self


class Data(Section):
    """Which text, cut into which tokens, in rows of which length."""

    corpus: Corpus = Field(default_factory=PlantedCorpus)
    """Where the documents come from."""
    tokenizer: Tokenizer = Field(default_factory=WordTokenizer)
    """How text becomes token ids."""
    splits: Splits = Field(default_factory=Splits)
    """How documents are divided."""
    n_ctx: Annotated[int, Field(ge=2)] = 128
    """Tokens per row."""
    rows: Literal["packed", "documents"] = "packed"
    """`packed` puts documents end to end; `documents` starts each in a row of its own, padded."""
    bos: Literal["auto", "always", "rows", "never"] = "auto"
    """BOS before each document (`always`), at the start of `rows` too, or as the tokenizer does."""
    eos: Literal["auto", "always", "never"] = "auto"
    """End-of-text after each document; `auto` where no BOS parts them or the tokenizer adds it."""
    chat: str | None = None
    """Column of chat messages, rendered by the tokenizer's template in place of a text column."""

    @model_validator(mode="after")
    def _check_ends(self) -> "Data":
        if self.rows == "packed" and self.bos == self.eos == "never":
            raise clash("want a BOS or an end-of-text between packed documents", "bos", "eos")
        if self.chat is not None and self.tokenizer.kind in ("words", "bpe"):
            raise clash("want a tokenizer with a chat template, kind: folder", "chat", "tokenizer")
        if self.chat is not None and isinstance(self.corpus, PlantedCorpus):
            raise clash("want a corpus with a column of messages: files or hub", "chat", "corpus")
        return self


class CrateModel(Section):
    """A CRATE language model; the defaults are the released one (arXiv 2410.16443)."""

    arch: Literal["crate"]
    n_layers: Count = 2
    """Blocks of one MSSA and one ISTA each."""
    d_model: Count = 128
    """Width of the stream."""
    n_heads: Count = 4
    """Attention heads; must divide `d_model`."""
    overcompleteness: Count = 4
    """Dictionary size over `d_model`: `d_mlp` = this x `d_model`."""
    n_ista_steps: Count = 2
    """Proximal gradient steps from the zero code."""
    step_size: Annotated[float, Field(gt=0.0)] | Literal["lipschitz"] = 0.1
    """Step (eta): a number, or `lipschitz` for 1/sigma_max(D)^2 by power iteration."""
    sparsity: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the L1 penalty (lambda)."""
    ista_skip: bool = False
    """Add the block's input to ISTA's output; the released model has no skip."""
    untied_decoder: bool = False
    """Decode the code with a second dictionary instead of the encoding one."""
    separate_query: bool = False
    """Give attention a query projection of its own (keys and values stay shared)."""
    learned_threshold: bool = False
    """Learn one threshold per neuron, starting at step_size x sparsity."""
    relu_mlp: bool = False
    """Put a ReLU MLP in ISTA's place, as an ablation; the settings of ISTA are then not used."""

    @model_validator(mode="after")
    def _check_heads(self) -> "CrateModel":
        _heads_divide_width(self)
        of_ista = ("n_ista_steps", "step_size", "sparsity", "untied_decoder", "learned_threshold")
        for name in of_ista if self.relu_mlp else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise clash("is a setting of ISTA, and relu_mlp puts an MLP in its place", name)
        return self


class Gpt2Model(Section):
    """The GPT-2 baseline: transformers' own model, with the released baseline's ReLU."""

    arch: Literal["gpt2"]
    n_layers: Count = 2
    """Blocks."""
    d_model: Count = 128
    """Width of the residual stream; `d_mlp` is four times this."""
    n_heads: Count = 4
    """Attention heads; must divide `d_model`."""
    activation: Literal["relu", "gelu_new"] = "relu"
    """Activation of the MLP's neurons."""

    @model_validator(mode="after")
    def _check_heads(self) -> "Gpt2Model":
        _heads_divide_width(self)
        return self


class PretrainedModel(Section):
    """A model that is trained already: any Hugging Face decoder; nothing is trained here."""

    arch: Literal["pretrained"]
    path: str = Field(min_length=1)
    """Folder that `save_pretrained` wrote, or a name on the Hugging Face Hub, which is downloaded
    once."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null takes its main branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory; `auto` takes the one they are saved in."""
    adapter: str | None = None
    """Folder or Hub name of a PEFT adapter (LoRA and its kin), merged into the weights."""
    untrained: bool = False
    """Draw new weights from the model's configuration by the run's seed, as a control."""
    device_map: Literal["auto", "balanced", "sequential"] | None = Field(
        default=None, exclude_if=lambda chosen: chosen is None
    )
    """Spread a model that is larger than one GPU over all of this process and the memory of the
    machine, as Accelerate does; null keeps it on one device."""


Model = Annotated[CrateModel | Gpt2Model | PretrainedModel, Field(discriminator="arch")]


class Keep(Section):
    """Steps of a training whose model stays, each as a run folder in `steps/` of the run."""

    at: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False)
    """Steps, ascending, `train.steps` at most; the model of the last step is the run's own."""
    log: bool = False
    """Steps 0, 1, 2, 4, 8, ... too, where features are learned fastest."""

    @model_validator(mode="after")
    def _check_order(self) -> "Keep":
        if list(self.at) != sorted(set(self.at)):
            raise clash("want ascending steps, each once", "at")
        return self


class Train(Section):
    """How the model is trained: AdamW with warm-up and cosine, as the paper's recipe."""

    steps: Annotated[int, Field(ge=0)] = 1000
    """Optimizer steps; 0 leaves the model untrained, as a control."""
    until: Annotated[int, Field(ge=0)] | None = None
    """Stop after this many of `steps`, whose schedule stays; lmmono writes it for kept steps."""
    keep: Keep = Field(default_factory=Keep)
    """Steps whose models stay beside that of the last step; none by default."""
    batch_tokens: Count = 8192
    """Tokens per optimizer step over all processes; a multiple of `data.n_ctx`."""
    micro_batch_tokens: Count | None = None
    """Tokens per forward pass and process; null takes the whole share of a process at once."""
    lr: Annotated[float, Field(gt=0.0)] = 2e-3
    """Peak learning rate."""
    min_lr_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps of linear warm-up."""
    beta1: Fraction = 0.9
    """AdamW's first moment decay."""
    beta2: Fraction = 0.95
    """AdamW's second moment decay."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decay of matrices and embeddings; vectors are never decayed."""
    clip_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest gradient norm."""
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    """`auto` takes bf16 on a GPU that has it and fp32 elsewhere."""
    eval_every_steps: Count = 250
    """Steps between evaluations on held-out documents."""
    eval_tokens: Count = 65_536
    """Held-out tokens per evaluation."""
    minimal_pairs: str | None = None
    """A file of sentence pairs in BLiMP's format (columns good, bad), scored at the end."""
    checkpoint_every_steps: Count | None = None
    """Steps between checkpoints; null keeps only an interrupted run's last one."""
    compile: bool = False
    """Compile the model with `torch.compile`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers to log to, beside `metrics.parquet`; wandb runs offline."""
    # left out where empty, so that recipes without objectives keep the digests that they had
    objectives: tuple[AnyObjective, ...] = Field(default=(), exclude_if=lambda chosen: not chosen)
    """Loss terms added to that of next tokens; `lmmono ls methods` lists them."""

    @model_validator(mode="after")
    def _leave_steps_after_warmup(self) -> "Train":
        if self.steps and self.warmup_steps >= self.steps:
            raise clash(
                f"want fewer than train.steps ({self.steps}), got {self.warmup_steps}",
                "warmup_steps",
                "steps",
            )
        raise_equal_names(self.objectives)
        if self.until is not None and self.until > self.steps:
            raise clash(f"want train.steps ({self.steps}) at most, got {self.until}", "until")
        if self.keep.at and self.keep.at[-1] > self.steps:
            message = f"want steps up to train.steps ({self.steps}), got {self.keep.at[-1]}"
            raise clash(message, "keep.at", "steps")
        return self

    @property
    def last_step(self) -> int:
        """The step whose model is the run's own."""
        return self.steps if self.until is None else self.until

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """Steps before the last one whose models stay, ascending."""
        powers = [0, *(2**k for k in range(self.last_step.bit_length()))] if self.keep.log else []
        return tuple(sorted(step for step in {*self.keep.at, *powers} if step < self.last_step))


class Sweep(Section):
    """A search for the learning rate of every arm before its runs, by the loss on held-out text."""

    lr: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(default=(), strict=False)
    """Peak learning rates to try, ascending; each arm takes the one of the least loss. None by
    default: `train.lr` is taken as it is."""
    steps: Count | None = None
    """Steps of each trial, with a schedule of its own; null takes `train.steps`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the trials."""

    @model_validator(mode="after")
    def _check_order(self) -> "Sweep":
        if list(self.lr) != sorted(set(self.lr)):
            raise clash("want ascending learning rates, each once", "lr")
        return self


class SkippedTokens(Section):
    """Tokens that do not count, by rule or id; they stay in the text that is shown."""

    special: bool = False
    """The tokenizer's special tokens, such as BOS, EOS and padding, on which many units fire."""
    first: Annotated[int, Field(ge=0)] = 0
    """Positions at the start of every row; the first ones have outlier activations."""
    token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False)
    """Further ids."""


class Capture(Section):
    """Which activations of which documents go into the store."""

    hooks: tuple[str, ...] = ("blocks.*.mlp.hook_post",)
    """Hook names or globs whose activations are stored as sparse rows with statistics."""
    signed: bool = False
    """Store what gated neurons are below 0 too, max(-act, 0), as hook `mlp.hook_post_neg`."""
    vectors: tuple[str, ...] = ()
    """Hook names or globs whose activations are stored as dense vectors."""
    splits: tuple[Split, ...] = ("explain", "score")
    """Splits of documents to capture."""
    max_tokens: Count | None = 200_000
    """Tokens per split, whole rows; null captures all."""
    threshold: float = 0.0
    """An activation is stored, and counts for density, when it is above this."""
    max_density: Fraction = 0.6
    """Refuse to store rows for a hook that fires more often than this."""
    top_k: Count = 32
    """Strongest exemplars per unit, one per document."""
    random_k: Count = 16
    """Exemplars per unit drawn uniformly over all tokens."""
    quantile_k: Count = 4
    """Exemplars per unit and quantile bin of its activation."""
    units: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, strict=False
    )
    """Units of `hooks` whose rows are stored, ascending; null stores all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Store only the smallest set of a token's activations that holds this share of their sum."""
    acts_per_token: Count | None = None
    """Store about this many activations per token and hook, each unit's strongest: for models whose
    units fire on most tokens. Statistics and exemplars see all of them; null stores all."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type that rows are rounded to; statistics use the value before rounding."""
    vectors_dtype: Literal["float32", "float16"] = "float16"
    """Type that vectors are rounded to; float16 holds nothing beyond 65,504."""
    skip: SkippedTokens = Field(default_factory=SkippedTokens)
    """Tokens left out of rows, vectors, statistics and exemplars; none by default."""
    batch_tokens: Count = 8192
    """Tokens per forward pass."""

    @model_validator(mode="after")
    def _check_units(self) -> "Capture":
        if self.units is not None and list(self.units) != sorted(set(self.units)):
            raise clash("want ascending units, each once", "units")
        if self.top_p is not None and self.threshold < 0.0:
            raise clash(f"want a threshold >= 0 with top_p, got {self.threshold:g}", "threshold")
        return self

"""How a cell is trained and tested: every setting checked before use, gaps filled from the model table."""
from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from carma_lib.files import fingerprint
from carma_lib.losses import CarmaConfig
from carma_lib.models.pretrained import names
from carma_lib.models.table import settings_for
from carma_lib.models import SMALL_FAMILIES, load_config, native_bf16
from carma_lib.pooling import PROTOCOLS
from carma_lib.tasks import TASKS

SMALL_STARTS = ("random", "base")
RANDOM = "random:"
EXAMPLES = "wordnet_examples"
Level = Literal["word", "phrase"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Layers = tuple[int, int]


class _Strict(BaseModel):
    """Settings that refuse an unknown name or a value of another type or range in one line (`ValueError`). Lists are tuples."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**{name: _tuple(value) for name, value in values.items()})
        except ValidationError as error:
            raise ValueError(_one_line(error, type(self))) from None

    def but(self, **changes: Any):
        """These settings with some changed, checked again."""
        return type(self)(**{**dict(self), **changes})


def _one_line(error: ValidationError, kind: type[BaseModel]) -> str:
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")  # a misspelt name before the one that is missing
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        if close := get_close_matches(str(first["loc"][-1]), kind.model_fields, n=1, cutoff=0.75):
            return f"unknown setting '{name}'; did you mean '{close[0]}'?"
        return f"unknown setting '{name}'; there are {', '.join(sorted(kind.model_fields))}"
    if first["type"] == "missing":
        return f"'{name}' is missing"
    why = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").replace("a valid tuple", "a list")
    why = why.replace("a valid dictionary", "names with values").replace(r"String should match pattern '\S'", "a name")
    if first["type"] == "value_error":  # a sentence of its own, such as that of a part
        return f"{name}: {why}" if name else why
    return f"'{name}' must be {why}, not {first['input']!r}"


class Training(_Strict):
    """How a cell's model is made.

    start: "random" weights of a small model, "base" for such a model trained on plain text first, else the name,
    hub id or folder of a pretrained model; "random:" before one takes its shape and tokenizer with new weights. family,
    layers, width, heads, vocabulary_size: of a small model; its tokenizer (and base model) is made of the training texts
    of `tokenizer_tasks`, without any of the cell's task. base_steps, base_learning_rate: of the language modelling that
    makes a base model.

    steps, or epochs over the training rows. batch_size: rows of a step, over `accumulation` micro-batches and
    `processes` (above 1: FSDP through torchrun). schedule: "linear" decay after `warmup_steps`, or "constant";
    gradient norm 1.0. keep: the checkpoint that is "best" on `validation_items` validation rows in `evaluations`
    looks, or the "last" step. test_at: steps before the end at which the test items are asked too; with a constant
    schedule each is what a training of that length gives. training_items: rows of a seeded shuffle, 0 for all.
    level: constituents of the mutual-information term. precision: "bf16" is mixed (float32 weights); "auto" is bf16
    for a pretrained model where the processor computes it natively. adapter: "lora" of `lora_rank` on a frozen start,
    "qlora" on a start of 4 bits (CUDA). threads: of one training on a CPU, fixed because sums depend on it.
    carma_weight to similarity: `CarmaConfig`. What is None is open: see `recipe_for`.
    """

    start: Annotated[str, Field(min_length=1)] = "random"
    family: Literal[SMALL_FAMILIES] = "llama"
    layers: Positive = 4
    width: Positive = 128
    heads: Positive = 4
    vocabulary_size: Annotated[int, Field(ge=258)] = 800
    tokenizer_tasks: tuple[str, ...] = ()
    base_steps: Positive = 1000
    base_learning_rate: Annotated[float, Field(gt=0)] = 0.002
    steps: Positive | None = None
    epochs: Positive | None = None
    batch_size: Positive | None = None
    accumulation: Positive = 1
    processes: Positive = 1
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    warmup_steps: Count | None = None
    schedule: Literal["linear", "constant"] = "linear"
    keep: Literal["best", "last"] = "best"
    evaluations: Positive = 4
    test_at: tuple[Positive, ...] = ()
    training_items: Count = 0
    validation_items: Positive = 500
    level: Level = "word"
    precision: Literal["auto", "float32", "bf16"] = "auto"
    activation_checkpointing: bool = False
    adapter: Literal["none", "lora", "qlora"] = "none"
    lora_rank: Positive = 16
    threads: Positive = 1
    carma_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    mi_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    stability_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    mi_layers: Layers | None = None
    stability_layers: Layers | None = None
    temperature: Annotated[float, Field(gt=0)] = 0.1
    num_negatives: Positive | None = 5
    similarity: Literal["cosine", "dot"] = "cosine"


class Testing(_Strict):
    """Under what a cell's model is tested.

    test_splits: of the task, every test split if empty; changed_splits: of these, those whose texts are also replaced
    and pooled, all if empty. rates: shares of content words replaced, the same texts for all models. synonyms: the
    task's own source, or "ranked", WordNet's candidates ranked in context by one fixed language model. adversary_rate:
    above 0, also the replacement with the highest loss among `adversary_tries`. depth_shares: where pooling starts,
    as shares of depth. test_items: first so many of each split, 0 for all; pooled_items: of these, the first so many
    are pooled and asked by the adversary, 0 for all. Items whose answer is not one token of a pretrained start do not
    count. measures: of hidden states and texts, after training and before: "drift", "perplexity", "information"
    (between a word's tokens), "structure" (sums of parts and read-outs; tasks with held-out combinations),
    over the first `measured_items` seen test items, 0 for `test_items`. plain_texts: of what perplexity is measured,
    tasks (their validation texts) and "wordnet_examples" (text of no task); by default of the cell's own texts, or of
    `tokenizer_tasks`; other data of another task do not make a tested cell another, so take a new folder for them.
    keep_model: keep the trained weights.
    """

    test_splits: tuple[str, ...] = ()
    changed_splits: tuple[str, ...] = ()
    rates: tuple[Share, ...] = (0.1, 0.25, 0.4)
    synonyms: Literal["task", "ranked"] = "task"
    replacement_seed: Count = 0
    adversary_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    adversary_tries: Positive = 8
    depth_shares: tuple[Share, ...] = (0.5, 0.75, 1.0)
    protocols: tuple[Literal[PROTOCOLS], ...] = PROTOCOLS
    levels: tuple[Level, ...] = ("word", "phrase")
    test_items: Count = 0
    pooled_items: Count = 0
    measures: tuple[Literal["drift", "perplexity", "information", "structure"], ...] = ("drift", "perplexity")
    measured_items: Count = 200
    plain_texts: tuple[str, ...] = ()
    evaluation_batch: Positive = 64
    keep_model: bool = True


_CARMA = ("carma_weight", "mi_weight", "stability_weight", "mi_layers", "stability_layers", "temperature",
          "num_negatives", "similarity")
#: What may be left open, and the values of small models. CARMA's weights are the published code's.
OPEN = {"batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 100, "carma_weight": 0.2, "mi_weight": 0.2,
        "stability_weight": 0.3, "mi_layers": None, "stability_layers": None}


class Recipe(Training, Testing):
    """One recipe of a cell: `Training` and `Testing`. Raises `ValueError` in one line for what cannot be done."""

    def model_post_init(self, _: Any) -> None:
        if self.steps and self.epochs:
            raise ValueError("steps and epochs are both given; leave one of them out")
        if self.batch_size and self.batch_size % (self.accumulation * self.processes):
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation × processes = "
                             f"{self.accumulation * self.processes}")
        if self.start == RANDOM or self.pretrained in SMALL_STARTS and not self.small:
            raise ValueError(f"start '{self.start}' needs the name, hub id or folder of a pretrained model after '{RANDOM}'")
        if self.adapter != "none" and not self.has_pretrained_weights:
            raise ValueError(f"adapter '{self.adapter}' needs pretrained weights; leave it at 'none' for random ones")
        if self.adapter == "qlora" and self.processes > 1:
            raise ValueError("a start of 4 bits is not sharded: take adapter 'lora', or processes=1")
        if self.small and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.small and self.family != "gpt2" and self.width // self.heads % 2:
            raise ValueError(f"width {self.width} divided by heads {self.heads} is odd, and {self.family} turns pairs of numbers: take an "
                             "even share")
        if self.depth_shares and not (self.protocols and self.levels):
            raise ValueError("pooling needs protocols and levels; leave depth_shares empty for none")
        for name in ("test_splits", "changed_splits", "rates", "depth_shares", "protocols", "levels", "measures", "plain_texts",
                     "test_at"):
            values = getattr(self, name)
            if len({round(value, 4) if isinstance(value, float) else value for value in values}) < len(values):  # as tables have them
                raise ValueError(f"{name} names something twice: {list(values)}")
        if trained := [name for name in self.test_splits + self.changed_splits if not name.startswith("test")]:
            raise ValueError(f"'{trained[0]}' is no test split; models are tested on splits that begin with 'test'")
        if self.test_splits and (absent := [name for name in self.changed_splits if name not in self.test_splits]):
            raise ValueError(f"changed_splits names '{absent[0]}', which test_splits leaves out: name it in both, or leave both empty")
        if self.steps:
            self.check_length(self.steps)
        if self.small:
            self.carma.for_depth(self.layers)

    @property
    def small(self) -> bool:
        """Whether the start is a small model of this project, not a pretrained one."""
        return self.start in SMALL_STARTS

    @property
    def has_pretrained_weights(self) -> bool:
        """Whether training begins from weights that somebody trained before."""
        return not self.small and self.start == self.pretrained

    @property
    def pretrained(self) -> str:
        """The name, id or folder that a start which is not small takes its configuration and tokenizer from."""
        return self.start.removeprefix(RANDOM)

    @property
    def carma(self) -> CarmaConfig:
        """The two terms."""
        given = {name: getattr(self, name) for name in _CARMA}
        return CarmaConfig(**{name: OPEN[name] if value is None and name in OPEN else value
                              for name, value in given.items()})

    @property
    def rows_a_pass(self) -> int:
        """Rows of one forward pass of one process."""
        return self.batch_size // (self.accumulation * self.processes)

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bf16."""
        return self.precision == "bf16" or (self.precision == "auto" and not self.small and native_bf16())

    def training_steps(self, rows: int) -> int:
        """Steps of a training on so many rows: `steps`, or `epochs` passes, the last batch of each not full."""
        return self.epochs * math.ceil(rows / self.batch_size) if self.epochs else self.steps

    def check_length(self, steps: int, why: str = "") -> None:
        """`ValueError` for a training of so many steps that ends before its warm-up, or before a step of `test_at`."""
        if self.test_at and max(self.test_at) > steps:
            raise ValueError(f"test_at names step {max(self.test_at)}, the training ends at {steps}{why}")
        if self.warmup_steps and self.warmup_steps > steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, longer than the training of {steps} steps{why}")

    def training_mark(self) -> str:
        """Changes when any setting of the training does."""
        return self._mark([name for name in Training.model_fields if name != "evaluations" or self.keep == "best"])

    def start_mark(self) -> str:
        """Changes when any setting does that the untuned model, its tokenizer or its precision may depend on."""
        return self._mark(["start", "family", "layers", "width", "heads", "vocabulary_size", "tokenizer_tasks", "base_steps",
                           "base_learning_rate", "batch_size", "warmup_steps", "precision", "adapter"])

    def testing_mark(self) -> str:
        """Changes when any setting of the tests does."""
        return self._mark([name for name in Testing.model_fields if name not in ("keep_model", "evaluation_batch")])

    def _mark(self, names: list[str]) -> str:
        """Of the settings that differ from their defaults, so that a new setting makes no finished cell another one."""
        fields = type(self).model_fields
        return fingerprint({name: getattr(self, name) for name in names if getattr(self, name) != fields[name].default})


class Filled(NamedTuple):
    """A recipe without gaps, the seeds, and where each value that was left open came from.

    published: for this model and task; published default: the published code's, for every model; ours.
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    sources: dict[str, str]

    def table(self) -> pd.DataFrame:
        """Value and source (given, published, published default, ours) of the settings that may be left open."""
        length = "epochs" if self.recipe.epochs else "steps"
        rows = {"seeds": self.seeds, **{name: getattr(self.recipe, name) for name in (length, *OPEN)}}
        return pd.DataFrame([{"setting": name, "value": str(value).strip("()"), "source": self.sources.get(name, "given")}
                             for name, value in rows.items()])


def recipe_for(kind: str, settings: Mapping[str, Any], *, seeds: tuple[int, ...] = ()) -> Filled:
    """The recipe of a kind of task; what the settings leave open comes from the model table.

    settings: fields of `Recipe`; a value may be a mapping kind → value. A pretrained start fills gaps from the model
    table (published where something is published, else scaled from its depth), a small one from `OPEN` and needs
    `steps` or `epochs`. seeds: empty to take them from the table too.

    Raises `ValueError` for an unknown or wrong setting or a gap that nothing fills, `ModelNotFound` if the start
    cannot be had.
    """
    chosen = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    chosen |= {name: value[kind] for name, value in settings.items() if isinstance(value, Mapping) and kind in value}
    kinds = sorted({kind, "own", *(task.kind for task in TASKS.values())})
    for name, value in settings.items():
        if name not in Recipe.model_fields:
            Recipe(**{name: None})
        if isinstance(value, Mapping) and (unknown := [of for of in value if of not in kinds]):
            raise ValueError(f"{name} has a value for '{unknown[0]}', which is no kind of task; there are {', '.join(kinds)}")
    recipe = Recipe(**{name: value for name, value in chosen.items() if value is not None or name == "num_negatives"})
    gaps = [name for name in OPEN if getattr(recipe, name) is None]
    length_open = not (recipe.steps or recipe.epochs)
    if recipe.small:
        if length_open:
            raise ValueError(f"no steps or epochs for {kind}: give one")
        if not seeds:
            raise ValueError("no seeds: give some, or a pretrained start for which the model table has them")
        carma = recipe.carma.for_depth(recipe.layers)
        values = {**OPEN, "mi_layers": carma.mi_layers, "stability_layers": carma.stability_layers}
        defaults, published = {"carma_weight", "mi_weight", "stability_weight"}, set()
    else:
        known = names().get(recipe.pretrained)  # of these the table has the depth: nothing is fetched to make a plan
        depth = known["blocks"] if known else load_config(recipe.pretrained).get_text_config().num_hidden_layers
        table = settings_for(recipe.pretrained, kind, num_layers=depth)
        layers = (0, table.last_layer)
        values = {**{name: getattr(table, name) for name in OPEN if not name.endswith("_layers")},
                  "mi_layers": layers, "stability_layers": layers, "epochs": table.epochs}
        defaults, published = set(table.defaults), set(table.published)
        gaps += ["epochs"] if length_open else []
        seeds, sources = (seeds, {}) if seeds else (table.seeds, {"seeds": "published" if "seeds" in published else "ours"})
        recipe.carma.for_depth(depth)
    sources = {} if recipe.small else sources
    for name in gaps:
        of = "last_layer" if name.endswith("_layers") else name
        sources[name] = "published" if of in published else "published default" if of in defaults else "ours"
    return Filled(recipe.but(**{name: values[name] for name in gaps}), tuple(seeds), sources)

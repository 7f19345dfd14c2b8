"""What a user asks for: one YAML file, checked whole before anything starts (layer 0, no torch).

Unions are keyed on `type`. An unknown key, a wrong type or a missing path is reported with all the others, each with
the key's full name and the nearest known one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from cdm.config_errors import ConfigError, apply_override, describe

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Split = Annotated[float, Field(gt=0, lt=1)]
Mass = Annotated[float, Field(gt=0, lt=1)]


class Strict(BaseModel):
    """A section of the config: unknown keys are errors, values never change after parsing."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _existing(path: str) -> str:
    if "://" not in path and not Path(path).expanduser().exists():
        raise ValueError(f"no such file or folder: {path}")
    return path


def _folder(path: str) -> str:
    if "://" in path:
        raise ValueError("must be a folder that every node mounts, not a URL")
    return path


def _hub_or_folder(name: str) -> str:
    looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
    return os.path.expanduser(_existing(name)) if looks_local else name


def _function(name: str) -> str:
    module, colon, function = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), function]):
        raise ValueError(f"expected module:function, got {name!r}")
    return name


Folder = Annotated[str, AfterValidator(_folder)]
ExistingPath = Annotated[str, AfterValidator(_existing)]
HubOrFolder = Annotated[str, AfterValidator(_hub_or_folder)]


# --- corpus ------------------------------------------------------------------------------------------------------


class Corpus(Strict):
    max_documents: Positive | None = Field(None, description="keep the first so many, in the order of their ids")
    min_response_bytes: Positive = 1
    max_response_bytes: Positive = Field(16_384, description="longer responses are left out, and counted")
    validation_share: Split = 0.02
    test_share: Split = 0.02
    part_documents: Positive = Field(256, description="documents a part; a part is the unit of work and of restart")

    @model_validator(mode="after")
    def _some_training_data(self) -> Corpus:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share leave nothing to train on")
        return self


class PythonPackages(Corpus):
    """Each documented function of the Python packages on the machine: signature and docstring -> source."""

    type: Literal["python_packages"]
    packages: list[str] | None = Field(None, description="import names; default: standard library, then all installed")


class Fields(Corpus):
    """Where the texts are: a prompt and a response column, or one column of chat messages."""

    prompt: str = "prompt"
    response: str | None = Field("response", description="null where there is no such column: `generation` writes all")
    messages: str | None = Field(
        None, description="a column of {role, content} turns; the last assistant one is taught"
    )
    system: str | None = Field(None, description="a system message put before every prompt")
    metadata: list[str] = Field(default_factory=list, description="further columns, kept with each document")


class Jsonl(Fields):
    type: Literal["jsonl"]
    path: ExistingPath = Field(description="a file or a folder of *.jsonl / *.jsonl.gz")


class ParquetCorpus(Fields):
    type: Literal["parquet"]
    path: ExistingPath = Field(description="a file, a folder or a URL")


class HuggingFace(Fields):
    type: Literal["huggingface"]
    name: HubOrFolder = Field(description="any name or local folder that `datasets.load_dataset` takes")
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


AnyCorpus = Annotated[PythonPackages | Jsonl | ParquetCorpus | HuggingFace, Field(discriminator="type")]


# --- models ------------------------------------------------------------------------------------------------------


class Optimisation(Strict):
    """How a model is trained; a batch is counted in tokens, so that it means the same on any number of workers."""

    steps: Annotated[int, Field(ge=0)]
    batch_tokens: Positive = Field(16_384, description="tokens a step, over all workers")
    micro_batch_tokens: Positive = Field(4_096, description="tokens (padding included) a worker holds at once")
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    max_length: Positive = Field(1024, description="tokens of prompt and response; longer responses are cut")
    activation_checkpointing: bool = False
    checkpoint_every: Positive = Field(100, description="steps")
    validate_every: Positive = Field(100, description="steps")
    validation_documents: Positive = 64


class TokenizerRecipe(Strict):
    type: Literal["byte_level_bpe", "sentencepiece_bpe"]
    vocab_size: Annotated[int, Field(ge=300)]


class Pretrain(Strict):
    """A model made here from the corpus: a tokenizer is trained, weights are initialised and trained for `steps`."""

    type: Literal["pretrain"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    architecture: Literal["qwen2", "llama"]
    tokenizer: TokenizerRecipe
    hidden_size: Positive
    intermediate_size: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    context: Positive = 1024
    training: Optimisation

    @model_validator(mode="after")
    def _shapes_fit(self) -> Pretrain:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden_size must be a multiple of heads, and heads of kv_heads")
        if self.architecture == "qwen2" and self.tokenizer.type != "byte_level_bpe":
            # Transformers and vLLM read every qwen2 folder with Qwen2's own kind of tokenizer.
            raise ValueError("architecture qwen2 needs tokenizer.type byte_level_bpe; llama takes either")
        if self.training.steps and self.training.max_length > self.context:
            raise ValueError(f"training.max_length {self.training.max_length} exceeds context {self.context}")
        return self


class Pretrained(Strict):
    """Weights that exist: a hub name or a local folder."""

    type: Literal["pretrained"] = "pretrained"
    name: HubOrFolder
    revision: str | None = None


def _model_type(value: Any) -> str | None:
    if isinstance(value, Pretrain | Pretrained):
        return value.type
    return value.get("type", "pretrained") if isinstance(value, dict) else None


def _name_is_enough(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


AnyModel = Annotated[
    Annotated[Pretrain, Tag("pretrain")] | Annotated[Pretrained, Tag("pretrained")],
    Discriminator(_model_type),
]


class NamesModel(Strict):
    @model_validator(mode="before")
    @classmethod
    def _model_by_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and "model" in values:
            return values | {"model": _name_is_enough(values["model"])}
        return values


class TakesModel(NamesModel):
    model: AnyModel = Field(description="a hub name, a folder, {name, revision}, or {type: pretrain, ...}")


class VllmEngine(Strict):
    type: Literal["vllm"]
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    tensor_parallel_size: Positive = 1
    gpu_memory_utilization: Share = 0.8
    kv_cache_gib: Annotated[float, Field(gt=0)] = Field(1.0, description="key-value cache on a CPU, GiB")
    max_num_batched_tokens: Positive = 8_192


class TransformersEngine(Strict):
    type: Literal["transformers"]
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    batch_tokens: Positive = Field(8_192, description="tokens (padding included) a forward pass")


AnyEngine = Annotated[VllmEngine | TransformersEngine, Field(discriminator="type")]


class Teacher(TakesModel):
    engine: AnyEngine = Field(default_factory=lambda: VllmEngine(type="vllm"))
    top_k: Positive = 100
    top_mass: Mass | None = Field(None, description="keep no more of the top k than hold this mass, at least 8 ids")
    max_length: Positive = Field(2_048, description="tokens of prompt and response; longer responses are cut")
    max_quarantined_share: Share = Field(0.01, description="more that cannot be scored fail the job")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="w_k of this teacher's KD term")

    @model_validator(mode="after")
    def _model_suffices(self) -> Teacher:
        _check_context(self.model, self.max_length)
        if isinstance(self.model, Pretrain) and self.top_k > self.model.tokenizer.vocab_size:
            raise ValueError(f"top_k {self.top_k} exceeds the model's vocabulary, {self.model.tokenizer.vocab_size}")
        return self


class Student(TakesModel, Optimisation):
    @model_validator(mode="after")
    def _model_suffices(self) -> Student:
        _check_context(self.model, self.max_length)
        return self


def _check_context(model: Pretrain | Pretrained, max_length: int, section: str = "") -> None:
    if isinstance(model, Pretrain) and max_length > model.context:
        raise ValueError(f"{section}max_length {max_length} exceeds the model's context, {model.context}")


# --- generation --------------------------------------------------------------------------------------------------


class FinalNumber(Strict):
    """The last number of the response is that of the reference: GSM8K and its kind."""

    type: Literal["final_number"]
    reference: str = Field(description="a column of corpus.metadata: the answer, or a text that ends with it")


class Function(Strict):
    """A function of the user's: (prompt, response, metadata) -> bool."""

    type: Literal["function"]
    name: Annotated[str, AfterValidator(_function)] = Field(description="module:function")


AnyCheck = Annotated[FinalNumber | Function, Field(discriminator="type")]


class Generation(NamesModel):
    """Responses that a model writes before anything is scored. Without this section every response is given."""

    model: AnyModel | None = Field(None, description="default: the first teacher's")
    engine: AnyEngine | None = Field(None, description="default: the first teacher's")
    max_length: Positive | None = Field(None, description="tokens of prompt and response; default: the first teacher's")
    replace: Literal["missing", "all"] = Field("missing", description="all: given ones too, in the training split")
    samples: Positive = Field(1, description="responses a training prompt")
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = Field(512, description="tokens of a response; one that is longer is left out, and counted")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, description="texts that end it")
    check: AnyCheck | None = Field(None, description="what a response must pass to be kept")

    @model_validator(mode="after")
    def _samples_differ(self) -> Generation:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"temperature 0 gives the same response {self.samples} times; set samples to 1")
        return self


# --- methods -----------------------------------------------------------------------------------------------------


class Sft(Strict):
    """Cross-entropy alone."""

    type: Literal["sft"]


class Distilled(Strict):
    """Cross-entropy and the teachers' terms: L = alpha * CE + (1 - alpha) * KD."""

    alpha: Share = Field(0.5, description="weight of cross-entropy; 1 - alpha is the teachers'")
    align: Literal["exact", "dtw", "dtw_unweighted"] = Field(
        "exact", description="groups: equal bytes, or warping by spelling, weighted by both models' entropies or not"
    )


class Tempered(Distilled):
    temperature: Annotated[float, Field(gt=0)] = 1.0


class SameTokenizer(Tempered):
    """Over the teacher's top-k and the rest; only for a teacher with the student's own tokenizer."""

    align: Literal["exact"] = "exact"


class Kl(SameTokenizer):
    type: Literal["kl"]


class ReverseKl(SameTokenizer):
    type: Literal["reverse_kl"]


class Js(SameTokenizer):
    type: Literal["js"]
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5


class SkewKl(SameTokenizer):
    type: Literal["skew_kl"]
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Uld(Tempered):
    """Sorted probabilities, rows paired by position (arXiv 2402.12030)."""

    type: Literal["uld"]


class MultilevelOt(Tempered):
    """Sorted transport of tokens and sequences (arXiv 2412.14528)."""

    type: Literal["multilevel_ot"]
    temperature: Annotated[float, Field(gt=0)] = 2.0
    log_weight: Annotated[float, Field(ge=0)] = 0.1
    sequence_weight: Annotated[float, Field(ge=0)] = 0.1
    blur: Annotated[float, Field(gt=0)] = 0.1
    iterations: Positive = 20


class MinEdit(Tempered):
    """A static map to the nearest spelling, one-hot targets elsewhere (FuseLLM, arXiv 2401.10491)."""

    type: Literal["min_edit"]
    align: Literal["exact", "dtw", "dtw_unweighted"] = "dtw_unweighted"
    threshold: Share = Field(0.3, description="largest edit distance of the static map")
    protect: bool = True


class Alm(Distilled):
    """Binary cross-entropy of the probabilities of each group's text (arXiv 2503.20083)."""

    type: Literal["alm"]
    scale: Annotated[float, Field(gt=0)] = 100.0


class Gold(Tempered):
    """Jensen-Shannon on the shared vocabulary, sorted differences on the rest (Hugging Face TRL)."""

    type: Literal["gold"]
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5


class StrictKl(Tempered):
    """Only 1:1 groups and the shared vocabulary (arXiv 2610.08448)."""

    type: Literal["strict"]
    top_k: Positive = 16
    reverse: bool = True


class Cdm(Tempered):
    """Contextual Dynamic Mapping (docs/method.md, sections 2-4)."""

    type: Literal["cdm"]
    threshold: Share = Field(0.3, description="theta: largest edit distance of a dynamic mapping")
    protect: bool = Field(True, description="numbers, operators and white space match exactly or not at all")
    top_k: Positive = Field(100, description="live candidates of the student, and of the teacher's stored ones")
    tail: Literal["renormalise", "residual"] = "renormalise"
    dual: bool = True
    rows: Literal["first", "mean"] = "first"


class PaperCdm(Cdm):
    """The same with the paper's own choices (arXiv 2502.11104) where they are merely different."""

    type: Literal["cdm_paper"]  # type: ignore[assignment]
    align: Literal["exact", "dtw", "dtw_unweighted"] = "dtw"
    protect: bool = False
    rows: Literal["first", "mean"] = "mean"


AnyMethod = Annotated[
    Sft | Kl | ReverseKl | Js | SkewKl | Uld | MultilevelOt | MinEdit | Alm | Gold | StrictKl | Cdm | PaperCdm,
    Field(discriminator="type"),
]


# --- the rest ----------------------------------------------------------------------------------------------------


class Evaluation(Strict):
    documents: Positive = Field(200, description="documents of the test split")
    samples: Annotated[int, Field(ge=0)] = Field(3, description="completions shown")
    sample_tokens: Positive = 64


class TeacherPool(Strict):
    actors: Positive = Field(1, description="engines at once")
    max_actors: Positive | None = Field(None, description="the pool may grow to so many; default: `actors`")
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    custom: dict[str, float] = Field(default_factory=dict, description="named Ray resources, an engine")


class StudentPool(Strict):
    workers: Positive = 1
    cpus: Annotated[float, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    custom: dict[str, float] = Field(default_factory=dict, description="named Ray resources, a worker")
    max_failures: Annotated[int, Field(ge=0)] = Field(3, description="restarts of a training run before it fails")
    timeout_s: Positive = Field(300, description="a worker that hangs is noticed after so long")


class Resources(Strict):
    """Where it runs. Never part of a run's identity."""

    teacher: TeacherPool = TeacherPool()
    student: StudentPool = StudentPool()


class Mlflow(Strict):
    type: Literal["mlflow"]
    uri: str | None = Field(None, description="default: sqlite in the storage folder")
    experiment: str = "cdm"


class NoTracking(Strict):
    type: Literal["none"]


AnyTracking = Annotated[Mlflow | NoTracking, Field(discriminator="type")]


class Config(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    storage: Folder = Field("outputs", description="shared by all nodes; every stage keeps its output below it")
    seed: int = 0
    corpus: AnyCorpus
    teachers: Annotated[list[Teacher], Field(min_length=1)]
    generation: Generation | None = None
    student: Student
    method: AnyMethod
    baselines: list[AnyMethod] = Field(default_factory=list, description="also trained, for the table of results")
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()
    tracking: AnyTracking = Field(default_factory=lambda: Mlflow(type="mlflow"))

    @model_validator(mode="after")
    def _methods_differ(self) -> Config:
        asked = [self.method, *self.baselines]
        if any(one == other for i, one in enumerate(asked) for other in asked[:i]):
            raise ValueError("baselines: each must differ from the method and from the others")
        return self

    @model_validator(mode="after")
    def _responses_come_from_somewhere(self) -> Config:
        columns = self.corpus if isinstance(self.corpus, Fields) else None
        if self.generation is None:
            if columns is not None and columns.response is None and columns.messages is None:
                raise ValueError("corpus.response is null and there is no `generation` that would write responses")
            return self
        max_length, check = self.generator.max_length, self.generation.check
        _check_context(self.generator.model, max_length, "generation.")
        if self.generation.max_tokens >= max_length:
            raise ValueError(
                f"generation.max_tokens {self.generation.max_tokens} leaves no room for a prompt: "
                f"max_length is {max_length}"
            )
        if isinstance(check, FinalNumber) and (columns is None or check.reference not in columns.metadata):
            raise ValueError(f"generation.check.reference: {check.reference!r} is not in corpus.metadata")
        return self

    @property
    def generator(self) -> Teacher:
        """Who writes responses: the first teacher, but for what `generation` says."""
        asked = self.generation or Generation()
        own = {"model": asked.model, "engine": asked.engine, "max_length": asked.max_length}
        return self.teachers[0].model_copy(update={key: value for key, value in own.items() if value is not None})


# --- reading -----------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config in a YAML file with `a.b=c` overrides applied.

    Raises ConfigError (a ValueError) with every problem found, each naming its key.
    """
    values = _read_yaml(Path(path))
    problems = []
    for override in overrides or []:
        try:
            apply_override(values, override)
        except ConfigError as error:
            problems += error.problems
    try:
        config = parse_config(values)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from error
    if problems:
        raise ConfigError(problems)
    return config


def parse_config(values: dict[str, Any]) -> Config:
    """The config in plain values. Raises ConfigError with every problem found."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([describe(problem, Config) for problem in error.errors()]) from error


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once in its section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands here twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError([f"{file}: {'a folder, expected a YAML file' if file.is_dir() else 'no such config file'}"])
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError([f"{file}{line}: not valid YAML: {error.problem}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: not valid YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{file}: expected a mapping of keys at the top level"])
    return values


# --- identity ----------------------------------------------------------------------------------------------------


def digest(*values: Any) -> str:
    """Hex sha256 of plain values and config sections: what was asked, in a canonical order."""

    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else value

    text = json.dumps([plain(value) for value in values], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def storage_path(config: Config, *names: str) -> str:
    """A path below the storage folder, absolute: workers have other working directories."""
    return os.path.join(os.path.abspath(os.path.expanduser(config.storage)), *names)

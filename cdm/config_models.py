"""Sections of the config about models: how they are made, trained, scored with and generated from (layer 0)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from cdm.config_types import HubOrFolder, Mass, Positive, Share, Strict, dotted_function


class Best(Strict):
    """The weights of the best validation so far are exported, not those of the last step."""

    metric: Literal["validation_bits_per_byte", "validation_kd", "validation_agreement"]
    patience: Positive | None = Field(None, description="validations in a row without a better one that end the run")


class Lora(Strict):
    """Low-rank adapters are trained instead of the weights, and merged into them on export (arXiv 2106.09685)."""

    rank: Positive = 16
    alpha: Positive = Field(32, description="an adapter's product is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="names of linear layers: q_proj, v_proj, ...; default: all but the head"
    )


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
    keep_checkpoints: Positive = Field(2, description="at least so many, the newest and the best among them")
    validate_every: Positive = Field(100, description="steps")
    validation_documents: Positive = 64
    best: Best | None = Field(None, description="without it the last step is exported")
    max_skipped: Positive = Field(3, description="steps in a row without a finite loss and gradient that fail the run")
    compile: bool = Field(False, description="torch.compile of the model's blocks")


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
        if self.training.best is not None and self.training.best.metric != "validation_bits_per_byte":
            raise ValueError(f"training.best.metric: {self.training.best.metric} needs a teacher; there is none here")
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
        check_context(self.model, self.max_length)
        if isinstance(self.model, Pretrain) and self.top_k > self.model.tokenizer.vocab_size:
            raise ValueError(f"top_k {self.top_k} exceeds the model's vocabulary, {self.model.tokenizer.vocab_size}")
        return self


class Student(TakesModel, Optimisation):
    seed: int | None = Field(None, description="of its weights and the order of its data; default: the config's")
    max_documents: Positive | None = Field(None, description="it is taught the first so many of the training split")
    lora: Lora | None = None
    freeze_embeddings: bool = Field(False, description="a head that is tied to them is frozen with them")
    min_coverage: Share = Field(0.9, description="share of the responses' bytes that both sides must see")

    @model_validator(mode="after")
    def _model_suffices(self) -> Student:
        check_context(self.model, self.max_length)
        return self


def check_context(model: Pretrain | Pretrained, max_length: int, section: str = "") -> None:
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
    name: Annotated[str, AfterValidator(dotted_function)] = Field(description="module:function")


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

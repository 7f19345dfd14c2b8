"""How much a corpus is on both sides, before a stage runs: counted, sampled, or said to be assumed (layer 2)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from cdm import parts
from cdm.config import Config, storage_path
from cdm.config_corpus import AnyCorpus, HuggingFace, Jsonl, PythonPackages
from cdm.config_models import Pretrain, Pretrained
from cdm.corpus import corpus_identity, read_documents, split_parts, write_corpus
from cdm.documents import DroppedError, Replace, document_of
from cdm.model_size import Work
from cdm.rates import Rates
from cdm.records import Document
from cdm.sources import jsonl_rows, parquet_rows
from cdm.tokenizers import Tokenizer, load_tokenizer

SAMPLE = 512  # documents
MEASURED = "measured"  # in the storage folder: what `cdm plan --measure` made
SMALL_VOCABULARY = 8192


@dataclass(frozen=True)
class Side:
    """One model's tokens: means a document. squares: of prompt and response together, squared."""

    prompt: float
    response: float
    squares: float
    source: str

    @property
    def tokens(self) -> float:
        return self.prompt + self.response

    def documents(self, count: float) -> Work:
        """What so many documents are, when the response alone goes through the head."""
        return Work(self.tokens, self.squares, self.response) * count

    def a_token(self, *, every_row: bool = False) -> Work:
        """What a mean token of a batch is; `every_row`: the prompt goes through the head too."""
        rows = self.tokens if every_row else self.response
        return Work(self.tokens, self.squares, rows) * (1 / self.tokens)


@dataclass(frozen=True)
class CorpusSize:
    """documents: all; shares: of them by split. sample: what tokens are counted on, empty where none can be read."""

    documents: int
    shares: dict[str, float]
    sample: tuple[Document, ...]
    source: str


def corpus_size(config: Config) -> CorpusSize:
    """From the storage folder where the corpus is there, else from the source's first documents.

    A hub's dataset is not fetched: its documents are those that `corpus.max_documents` says, and nothing is sampled.
    Raises ValueError where that key is missing then, and where nothing of the source can be used.
    """
    section, replace = config.corpus, None if config.generation is None else config.generation.replace
    test, validation = section.test_share, section.validation_share
    shares = {"train": 1 - test - validation, "validation": validation, "test": test}
    found = _written(config, replace)
    if found is not None:
        return found
    if isinstance(section, HuggingFace):
        if section.max_documents is None:
            raise ValueError(
                "corpus.max_documents: a hub's dataset is not fetched to be counted; say how many documents"
            )
        return CorpusSize(section.max_documents, shares, (), "corpus.max_documents; bytes a document assumed")
    documents, total = (
        _of_packages(section, replace) if isinstance(section, PythonPackages) else _first(section, replace)
    )
    if not documents:
        raise ValueError("corpus: none of the source's first documents can be used")
    total = min(total, section.max_documents or total)
    return CorpusSize(total, shares, tuple(documents), f"the source's first {len(documents)} documents")


def _written(config: Config, replace: Replace | None) -> CorpusSize | None:
    identity = corpus_identity(config.corpus, replace)
    for folder in sorted(Path(storage_path(config, "corpus")).glob("*/")):
        if parts.is_finished(str(folder)):
            manifest = parts.read_manifest(str(folder))
            if manifest.meta.get("identity") == identity and "splits" in manifest.meta:
                shares = {split: count / manifest.rows for split, count in manifest.meta["splits"].items()}
                names = split_parts(manifest, "train")
                first = (document for name in names for document in read_documents(str(folder), name))
                return CorpusSize(manifest.rows, shares, tuple(islice(first, SAMPLE)), "the finished corpus")
    return None


def _of_packages(section: PythonPackages, replace: Replace | None) -> tuple[list[Document], int]:
    """Written as the stage does, into a temporary folder: seconds, and the number is exact."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_corpus(section, folder, replace=replace)
        names = split_parts(manifest, "train")
        first = list(islice((document for name in names for document in read_documents(folder, name)), SAMPLE))
        return first, manifest.rows


def _first(section: AnyCorpus, replace: Replace | None) -> tuple[list[Document], int]:
    """The first documents of files, and about how many there are: rows by the mean row's share of the files' bytes."""
    assert not isinstance(section, HuggingFace | PythonPackages)
    texts = [section.messages] if section.messages else [section.prompt, *filter(None, [section.response])]
    columns = list(dict.fromkeys([*texts, *section.metadata]))
    rows = jsonl_rows(section.path, columns) if isinstance(section, Jsonl) else parquet_rows(section.path, columns)
    documents, read = [], 0
    for where, row in islice(rows, 4 * SAMPLE):
        read += 1
        try:
            documents.append(document_of(section, replace, where, row))
        except DroppedError:
            continue
        if len(documents) == SAMPLE:
            break
    left = sum(1 for _ in rows) if documents else 0  # rows are read, not parsed into documents: a pass over the files
    return documents, len(documents) + round(left * len(documents) / max(1, read))


# --- tokens ------------------------------------------------------------------------------------------------------


def side(model: Pretrain | Pretrained, max_length: int, corpus: CorpusSize, storage: str, rates: Rates) -> Side:
    """A model's tokens of the corpus, cut to `max_length`; a document whose prompt alone is longer has none.

    Raises ValueError where the model exists and its tokenizer cannot be read.
    """
    tokenizer = _tokenizer(model, storage)
    assumed = rates.assumed
    if tokenizer is not None and corpus.sample:
        lengths = np.array(list(_lengths(tokenizer, corpus.sample, max_length)), float)
        return _side(lengths, "sampled with its tokenizer")
    small = isinstance(model, Pretrain) and model.tokenizer.vocab_size <= SMALL_VOCABULARY
    per_token = assumed.small_vocabulary_bytes_a_token if small else assumed.bytes_a_token
    sizes = [_bytes(document) for document in corpus.sample] or [(assumed.prompt_bytes, assumed.response_bytes)]
    lengths = np.array(sizes, float) / per_token
    lengths[:, 1] = np.minimum(lengths[:, 1], np.maximum(max_length - lengths[:, 0], 0))
    lengths[lengths[:, 0] >= max_length] = 0
    return _side(lengths, f"assumed: {per_token:g} bytes a token")


def _side(lengths: np.ndarray, source: str) -> Side:
    if not lengths.sum():
        raise ValueError("corpus: no sampled prompt fits into max_length")
    prompt, response = lengths.mean(0)
    return Side(float(prompt), float(response), float((lengths.sum(1) ** 2).mean()), source)


def _bytes(document: Document) -> tuple[float, float]:
    return sum(len(message.content.encode()) for message in document.prompt), len(document.response.encode())


def _lengths(tokenizer: Tokenizer, documents: Sequence[Document], max_length: int) -> Iterator[tuple[int, int]]:
    for document in documents:
        try:
            prompt = len(tokenizer.encode_prompt(document.prompt))
            response = len(tokenizer.encode_with_ends(document.response)[0]) + 1
        except ValueError:  # a template that refuses the prompt: the teacher's quarantine
            prompt = max_length
        yield (prompt, min(response, max_length - prompt)) if prompt < max_length else (0, 0)


def _tokenizer(model: Pretrain | Pretrained, storage: str) -> Tokenizer | None:
    """A model's own; of one that is to be made, what the storage folder has of that name, else none."""
    if isinstance(model, Pretrained):
        return load_tokenizer(model.name, revision=model.revision)
    made = [
        path for root in (storage, f"{storage}/{MEASURED}") for path in Path(root, "models").glob(f"{model.name}-*/")
    ]
    made = [path for path in made if (path / "tokenizer.json").exists()]
    return load_tokenizer(str(made[0])) if made else None

"""Prompts without a response -> documents that a model wrote, as parts of an ordinary corpus folder (layer 2).

A part of the source corpus becomes the part of the same name: given responses as they are, and the samples that pass
every filter, in the order of their ids. What was asked and what came of it are in the part's footer, so that both
appear in one rename. Seeds are a function of the prompt's document and the sample's number: a part made again is the
same part.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdm import parts
from cdm.checks import make_check
from cdm.corpus import ROW_GROUP, SPLITS, Replace, table_of, to_generate
from cdm.documents import DroppedError, document_id, size_problem
from cdm.generators import GENERATORS, Generator, Request, Sampling
from cdm.parts import Manifest
from cdm.records import Document
from cdm.tokenizers import TokenizationError, Tokenizer, check_lossless, load_tokenizer

SAMPLE = "cdm.sample"  # in the metadata: the id of the document that had no response, a slash, the sample's number
_FOOTER = b"cdm.generated"


class ResponseGenerator:
    """A plain callable around one engine; nothing of Ray in it.

    engine is {"type": "vllm" | "transformers", and that engine's options}, check a section of the config or None.
    Raises ValueError when the tokenizer is lossy or has no end of turn, or the check cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        engine: Mapping[str, Any],
        max_length: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
        stop: Sequence[str],
        samples: int,
        replace: Replace,
        min_bytes: int,
        max_bytes: int,
        check: Mapping[str, Any] | None,
        seed: int,
    ) -> None:
        options = dict(engine)
        kind = options.pop("type")
        self.tokenizer = load_tokenizer(model, revision=revision)
        check_lossless(self.tokenizer)
        self.sampling = Sampling(temperature, top_p, max_tokens, tuple(stop), stop_ids(self.tokenizer))
        self.max_prompt = max_length - max_tokens
        self.samples, self.replace, self.seed = samples, replace, seed
        self.min_bytes, self.max_bytes = min_bytes, max_bytes
        self.check = make_check(check)
        self.engine: Generator = GENERATORS[kind](
            model,
            revision=revision,
            tokenizer=self.tokenizer,
            max_length=max_length,
            **options,
        )

    def __call__(self, documents: Sequence[Document], split: str) -> tuple[list[Document], Counter[str]]:
        """The documents of one part of a split, by id, and the counts of what came of them.

        Training prompts get `samples` responses each, held-out ones a single one.
        """
        kept = {d.id: d for d in documents if not to_generate(d, split, self.replace)}
        counts = Counter(given=len(kept), prompts=0, samples=0, tokens=0, generated=0)
        missing = [document for document in documents if document.id not in kept]
        asked = self._requests(missing, self.samples if split == "train" else 1, counts)
        written = self.engine.generate([request for _, _, request in asked], self.sampling)
        for (document, sample, _), ids in zip(asked, written, strict=True):
            counts.update(samples=1, tokens=len(ids))
            try:
                found = self._document(document, sample, ids)
            except DroppedError as reason:
                counts[str(reason)] += 1
                continue
            counts["duplicates" if found.id in kept else "generated"] += 1
            kept.setdefault(found.id, found)
        return sorted(kept.values(), key=lambda document: document.id), counts

    def _requests(
        self, documents: Sequence[Document], samples: int, counts: Counter[str]
    ) -> list[tuple[Document, int, Request]]:
        """(document, sample number, request) of each sample; `counts` learns why prompts have none."""
        asked = []
        for document in documents:
            counts["prompts"] += 1
            try:
                prompt_ids = self._prompt_ids(document)
            except DroppedError as reason:
                counts[str(reason)] += 1
                continue
            for sample in range(samples):
                asked.append((document, sample, Request(prompt_ids, sample_seed(self.seed, document.id, sample))))
        return asked

    def _prompt_ids(self, document: Document) -> list[int]:
        try:
            prompt_ids = self.tokenizer.encode_prompt(document.prompt)
        except ValueError as error:  # a template that refuses the prompt
            raise DroppedError("prompt_refused") from error
        if len(prompt_ids) > self.max_prompt:
            raise DroppedError("prompt_too_long")
        return prompt_ids

    def _document(self, source: Document, sample: int, ids: Sequence[int]) -> Document:
        """One sample as a document. Raises DroppedError with the reason why it is left out."""
        text = response_text(self.tokenizer, ids, self.sampling)
        problem = size_problem(text, self.min_bytes, self.max_bytes)
        if problem is not None:
            raise DroppedError(problem)
        try:
            self.tokenizer.encode_with_ends(text)
        except TokenizationError as error:
            raise DroppedError("not_spelled") from error
        if not self.check(source.prompt, text, source.metadata):
            raise DroppedError("check_failed")
        metadata = {**source.metadata, SAMPLE: f"{source.id}/{sample}"}
        return Document(document_id(source.prompt, text), source.prompt, text, metadata)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a response: the template's end of turn, and eos where it is another one."""
    roles = tokenizer.special_roles
    return tuple(dict.fromkeys([tokenizer.end_of_turn_id, *([roles["eos"]] if "eos" in roles else [])]))


def sample_seed(seed: int, identity: str, sample: int) -> int:
    """63 bits."""
    content = f"{seed}:{identity}:{sample}".encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1


def response_text(tokenizer: Tokenizer, ids: Sequence[int], sampling: Sampling) -> str:
    """What new tokens spell before the token or text that ended them, in NFC.

    Raises DroppedError: special_token (or an unused id) within, unfinished, not_unicode.
    """
    end = next((i for i, token in enumerate(ids) if token in sampling.stop_ids), None)
    try:
        spelled = tokenizer.spell_response(ids[:end])
    except TokenizationError as error:
        raise DroppedError("special_token") from error
    places = [place for text in sampling.stop if (place := spelled.find(text.encode())) >= 0]
    if end is None and not places:
        raise DroppedError("unfinished")
    try:
        text = spelled[: min(places, default=len(spelled))].decode()
    except UnicodeDecodeError as error:
        raise DroppedError("not_unicode") from error
    return unicodedata.normalize("NFC", text)


def split_name(part_name: str) -> str:
    """The split of a part, as its name says."""
    return part_name.rpartition("-")[0]


# --- parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartGenerated:
    """What came of one part, as its footer says."""

    counts: dict[str, int]
    documents: int


def write_generated(
    folder: str, name: str, documents: Sequence[Document], counts: Mapping[str, int], identity: Mapping[str, Any]
) -> parts.Part:
    """Write one part atomically; the same documents leave the same bytes. `identity` is plain JSON values."""
    sizes = {
        "response_bytes": sum(len(document.response.encode()) for document in documents),
        "prompt_bytes": sum(len(message.content.encode()) for document in documents for message in document.prompt),
    }
    footer = {"identity": dict(identity), "counts": {**counts, **sizes}}
    table = table_of(list(documents)).replace_schema_metadata({_FOOTER: json.dumps(footer, sort_keys=True)})
    return parts.write_part(folder, name, table, row_group_size=ROW_GROUP)


def read_generated(folder: str, name: str, identity: Mapping[str, Any]) -> PartGenerated:
    """The footer of one part. Raises ValueError where it was made for something else than `identity`."""
    with parts.open_part(folder, name) as file:
        metadata, documents = file.schema_arrow.metadata or {}, file.metadata.num_rows
    if _FOOTER not in metadata:
        raise ValueError(f"{folder}/{name}: a Parquet file, but no generated documents; is this another folder?")
    footer = json.loads(metadata[_FOOTER])
    for key in sorted({*identity, *footer["identity"]}):
        found, wanted = footer["identity"].get(key), identity.get(key)
        if found != wanted:
            raise ValueError(f"{folder}/{name}: {key} is {found!r}, expected {wanted!r}; delete the folder")
    return PartGenerated(footer["counts"], documents)


def finish_generated(folder: str, names: Sequence[str], identity: Mapping[str, Any]) -> Manifest:
    """Write the manifest of a corpus folder over the parts `names` that hold documents.

    Raises ValueError where a part is missing or made for something else, and where no training document is left.
    """
    found = {name: read_generated(folder, name, identity) for name in names}
    counts: Counter[str] = Counter()
    for part in found.values():
        counts.update(part.counts)
    sizes = {key: counts.pop(key) for key in ("response_bytes", "prompt_bytes")}
    documents = {
        split: sum(found[name].documents for name in names if name.startswith(f"{split}-")) for split in SPLITS
    }
    if not documents["train"]:
        raise ValueError(f"generation: no training document is left ({dict(counts)})")
    meta = {"source": "generated", "generation": dict(identity), "counts": dict(counts), "splits": documents, **sizes}
    return parts.finish(folder, meta, kind="corpus", names=[name for name in names if found[name].documents])

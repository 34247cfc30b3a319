"""What became of a document: the samples it went to, and its text, put together again from them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from millstream.corpus.kinds import place
from millstream.errors import RequestError, RunError, setting
from millstream.folder.dataset import Dataset, Located, Placement
from millstream.folder.dataset import open as open_run
from millstream.folder.manifest import TOKENIZER
from millstream.records import DocumentFault
from millstream.store import File, at
from millstream.stream.tokenizers import Tokenizer, from_definition, load_tokenizer


@dataclass(frozen=True)
class Provenance:
    """All that became of the documents with one id: those that were packed, and those left out as faults."""

    document_id: str
    documents: list[tuple[Dataset, Located]]
    faults: list[DocumentFault]

    def only(self, number: int) -> "Provenance":
        """What became of the one of them with this number in the corpus. Raises RequestError if there is none."""
        documents = [pair for pair in self.documents if pair[1].ordinal == number]
        faults = [fault for fault in self.faults if fault.ordinal == number]
        if not documents and not faults:
            raise RequestError(f"number {number} has not the id {self.document_id!r}: give one of {self._numbers()}")
        return Provenance(self.document_id, documents, faults)

    def one(self) -> tuple[Dataset, Located]:
        """The only document that was packed. Raises RequestError if several were."""
        if len(self.documents) > 1:
            raise RequestError(
                f"{len(self.documents)} documents have the id {self.document_id!r}: choose one with "
                f"{setting('number')}, of {self._numbers()}"
            )
        return self.documents[0]

    def _numbers(self) -> str:
        numbers = [found.ordinal for _, found in self.documents] + [fault.ordinal for fault in self.faults]
        return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")

    def as_json(self, text: bool = False) -> dict[str, Any]:
        """With `text`, each document's too; raises as `text_of` does."""
        documents = []
        for dataset, found in self.documents:
            placements = [_placement(dataset, placement) for placement in found.placements if placement.length]
            document = {
                "subset": found.subset,
                "id": found.id,
                "ordinal": found.ordinal,
                "source": found.source,
                "offset": found.offset,
                "length": found.length,
                "cut_off": found.cut_off,
                "placements": placements,
            }
            documents.append({**document, "text": text_of(dataset, found)} if text else document)
        return {"id": self.document_id, "documents": documents, "faults": [fault._asdict() for fault in self.faults]}


def _placement(dataset: Dataset, placement: Placement) -> dict[str, Any]:
    where = {len(dataset): "remainder", None: "dropped"}.get(placement.sample, "sample")
    sample = placement.sample if where == "sample" else None
    at = None if where == "dropped" else placement.at
    return {"where": where, "sample": sample, "at": at, "start": placement.start, "length": placement.length}


def provenance(folder: str, document_id: str) -> Provenance:
    """What became of the documents of this id, in all subsets. Raises RequestError if the run knows of none."""
    first = open_run(folder)
    others = [open_run(folder, name) for name in first.manifest.subsets if name != first.subset]
    documents = [(dataset, found) for dataset in [first, *others] for found in dataset.locate(document_id)]
    faults = first.faults_of(document_id)
    if not documents and not faults:
        name = first.manifest.inputs[0].name if first.manifest.inputs else "corpus.jsonl"
        named = name if place(name, 0) == name else f"{name}#0"
        raise RequestError(
            f"{folder} has no document with the id {document_id!r}; those without one are named for their place, as "
            f"{named!r} is"
        )
    return Provenance(document_id, documents, faults)


def text_of(dataset: Dataset, document: str | int | Located) -> str:
    """A document's text, decoded from its ids in the samples, without the BOS and EOS that the run added.

    `document` is an id, an ordinal or what `Dataset.locate` found. It is the text that was read, character for
    character, with any tokenizer whose ids keep all of it, as byte-level ones without a normalizer do. Raises KeyError
    if there is none, RequestError if several documents have the id or if the run has no tokenizer, RunError if ids of
    the document were dropped with the remainder, or cut off for being more than a sample.
    """
    tokenizer = tokenizer_of(dataset)
    if tokenizer is None:
        raise RequestError(f"{dataset.folder} was packed from ids without a tokenizer, so it has no text to show")
    if not isinstance(document, Located):
        located = dataset.locate(document)
        if not located:
            raise KeyError(document)
        if len(located) > 1:
            numbers = ", ".join(str(found.ordinal) for found in located[:8])
            raise RequestError(f"{len(located)} documents have the id {document!r}: ask for an ordinal, of {numbers}")
        document = located[0]
    if document.cut_off:
        kept = f"{document.length:,} of its {document.length + document.cut_off:,} ids"
        raise RunError(f"document {document.id!r} was longer than a sample, so the run has only {kept}")
    ids = dataset.document_ids(document).tolist()
    settings = dataset.manifest.settings
    if ids and settings.bos_id is not None and ids[0] == settings.bos_id:
        del ids[0]
    if ids and settings.eos_id is not None and ids[-1] == settings.eos_id:
        del ids[-1]
    return tokenizer.engine.decode(ids)


def tokenizer_of(dataset: Dataset) -> Tokenizer | None:
    """The tokenizer that a run was made with: from the folder itself, or by name. Raises RunError if it has changed."""
    named = dataset.manifest.settings.tokenizer
    if not named:
        return None
    kept = File(at(dataset.folder), TOKENIZER)
    tokenizer = _from_definition(named.name, kept.text()) if kept.exists() else load_tokenizer(named.name)
    if tokenizer.sha256 != named.sha256:
        raise RunError(f"tokenizer {named.name} has changed: {dataset.folder} was packed with another one")
    return tokenizer


@lru_cache(maxsize=2)
def _from_definition(name: str, definition: str) -> Tokenizer:
    return from_definition(name, definition, decodes_only=True)

"""The reading side of a run: its corpus in units, what a worker makes of each, and its place in the run."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from millstream.formats.documents import Fields
from millstream.formats.exports import largest_id
from millstream.formats.slices import Limits, slices, units
from millstream.formats.sources import InputShard
from millstream.records import Cursor, Slice
from millstream.runs.pack.encode import Encode
from millstream.runs.pack.numbering import Numbering
from millstream.runs.pack.settings import Settings, columns_of
from millstream.stream.chat import Chat
from millstream.stream.overlong import Overlong
from millstream.stream.tokenizers import Tokenizer

Unit = tuple[Slice, ...]


class Reading:
    """How a corpus is read with these `settings`; `known` is what of them decides the bytes, as the manifest has it."""

    def __init__(
        self,
        shards: list[InputShard],
        settings: Settings,
        known: dict[str, Any],
        tokenizer: Tokenizer | None,
        chat: Chat | None,
    ) -> None:
        self._shards, self._settings, self._known = shards, settings, known
        self._tokenizer, self._chat = tokenizer, chat

    def units(self, cursor: Cursor, used: Cursor | None = None) -> Iterator[Unit]:
        """The corpus from `cursor` on; what lies before `used` is compared with what an earlier run has read."""
        fixed = self._known["max_document"]
        limits = Limits(
            fixed["bytes"],
            fixed["bytes"] if fixed["plain_text_too"] else None,
            bool(self._tokenizer and self._tokenizer.safe_cuts),
        )
        block = self._settings.block
        return units(slices(self._shards, cursor, limits, columns_of(self._settings), block, used), block)

    def encode(self) -> Encode:
        """What workers do with a unit."""
        settings, known, tokenizer = self._settings, self._known, self._tokenizer
        formats = [known["format"], *(known["exports"] or ())]
        return Encode(
            Fields(
                settings.text_field,
                settings.id_field,
                settings.ids_field,
                tokenizer.vocab_size - 1 if tokenizer else largest_id(formats),
                self._chat.render if self._chat else None,
            ),
            settings.tokenizer_name,
            tokenizer.sha256 if tokenizer else None,
            known["bos_id"],
            known["eos_id"],
            int(known["max_document"]["bytes"]),
            settings.validation,
            settings.engine,
            settings.masked,
        )

    def numbering(self) -> Numbering:
        """What gives the results their place."""
        settings, known = self._settings, self._known
        return Numbering(
            [shard.name for shard in self._shards],
            specials=(known["bos_id"] is not None, known["eos_id"] is not None),
            masked=settings.masked,
            limit=settings.limit,
            overlong=Overlong(settings.overlong, settings.seq_len, known["eos_id"]),
        )


def without_data(unit: Unit, inputs: list[InputShard]) -> Unit:
    """What workers can read themselves need not be sent."""
    return tuple(
        replace(piece, data=None) if piece.data and inputs[piece.source].seekable and piece.kind != "rows" else piece
        for piece in unit
    )

"""The reading side of a run: its corpus in units, what a worker makes of each, and its place in the run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from millstream.corpus.documents import Fields
from millstream.corpus.limits import Limits, Manner
from millstream.corpus.parts import parts
from millstream.corpus.slices import slices, units
from millstream.corpus.sources import InputShard
from millstream.corpus.unpacked import Unpack
from millstream.exports import largest_id
from millstream.folder.entries import Identity
from millstream.records import Cursor, Part, Slice
from millstream.runs.pack.encode import Encode
from millstream.runs.pack.numbering import Numbering
from millstream.runs.pack.pieces import Pieces
from millstream.runs.pack.settings import Settings, columns_of
from millstream.runs.pack.tokenizing import PIECE, PartTask, TokenizePart
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
        known: Identity,
        tokenizer: Tokenizer | None,
        chat: Chat | None,
    ) -> None:
        self._shards, self._settings, self._known = shards, settings, known
        self._tokenizer, self._chat = tokenizer, chat

    @property
    def manner(self) -> Manner:
        fixed = self._known.max_document
        text = fixed.bytes if fixed.plain_text_too else None
        rows = self._settings.ids_field or self._chat  # of which plain text has none: it is one fault
        cut = bool(self._tokenizer and self._tokenizer.safe_cuts and not rows)
        limits = Limits(fixed.bytes, text, cut)
        return Manner(limits, columns_of(self._settings), self._settings.block)

    def units(self, cursor: Cursor, used: Cursor | None = None) -> Iterator[Unit]:
        """The corpus from `cursor` on; what lies before `used` is compared with what an earlier run has read."""
        return units(slices(self._shards, cursor, self.manner, used), self._settings.block)

    def parts(self, cursor: Cursor, size: int) -> Iterator[Part]:
        """The same in parts of about `size` bytes of input; a text is cut only if its ids are not cut off."""
        whole_texts = self._settings.overlong != "cut"
        return parts(self._shards, cursor, self.manner, size, whole_texts=whole_texts)

    def unpack(self, pieces: Pieces, used: Cursor | None, size: int, *, shared: bool = False) -> Unpack:
        """What a worker does with a packed input of which others are to have parts of `size` bytes; `used` and `shared`
        as in `tokenize_part`."""
        return Unpack(self._shards, self.manner, pieces.put, size, used, shared=shared)

    def tokenize_part(
        self, pieces: Pieces, used: Cursor | None = None, size: int = PIECE, *, afar: bool = False, shared: bool = False
    ) -> TokenizePart:
        """What workers do with a part, in pieces of about `size` bytes of text; `used` is how far an earlier run has
        read. Workers on machines `afar` get the tokenizer itself: its name may lead nowhere there. What is `shared` is
        also done by those who may read what others cannot."""
        encode = self.encode()
        if afar and self._tokenizer:
            encode = replace(encode, tokenizer=self._tokenizer.again or encode.tokenizer)
        return TokenizePart(
            manner=self.manner,
            encode=encode,
            numbering=self._numbering({}),
            pieces=pieces,
            size=size,
            used=used,
            shared=shared,
        )

    def part_task(self, part: Part, sizes: dict[int, int] | None = None) -> PartTask:
        """A part as workers are given it; `sizes` of its inputs, by number."""
        return PartTask(part, {each.source: self._shards[each.source] for each in part.ranges}, sizes or {})

    def encode(self) -> Encode:
        """What workers do with a unit."""
        settings, known, tokenizer = self._settings, self._known, self._tokenizer
        formats = [known.format, *(known.exports or ())]
        return Encode(
            fields=Fields(
                settings.text_field,
                settings.id_field,
                settings.ids_field,
                tokenizer.vocab_size - 1 if tokenizer else largest_id(formats),
                self._chat.render if self._chat else None,
            ),
            tokenizer=settings.tokenizer_name,
            sha256=tokenizer.sha256 if tokenizer else None,
            bos=known.bos_id,
            eos=known.eos_id,
            max_document=known.max_document.bytes,
            validation=settings.validation,
            engine=settings.engine,
            masked=settings.masked,
        )

    def numbering(self) -> Numbering:
        """What gives the results their place."""
        return self._numbering([shard.name for shard in self._shards])

    def _numbering(self, names: Sequence[str] | Mapping[int, str]) -> Numbering:
        settings, known = self._settings, self._known
        return Numbering(
            names,
            specials=(known.bos_id is not None, known.eos_id is not None),
            masked=settings.masked,
            limit=settings.limit,
            overlong=Overlong(settings.overlong, settings.seq_len, known.eos_id),
        )


def without_data(unit: Unit, inputs: list[InputShard]) -> Unit:
    """What workers can read themselves need not be sent; what is far away is not fetched twice."""
    at_hand = [inputs[piece.source].seekable and not inputs[piece.source].far for piece in unit]
    return tuple(
        replace(piece, data=None) if piece.data and here and piece.kind != "rows" else piece
        for piece, here in zip(unit, at_hand, strict=True)
    )

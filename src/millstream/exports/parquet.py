"""Parquet for Hugging Face `datasets` and TRL: one row a sample."""

from millstream.exports.out import Out
from millstream.folder.columns import batch, schema
from millstream.folder.samples import ShardSamples


def shard(given: ShardSamples, out: Out) -> int:
    """samples-00000.parquet with the columns of `schema`."""
    import pyarrow.parquet as pq

    samples, written = given.samples, 0
    columns = schema(samples.padded or samples.masked, samples.settings.in_parquet)
    with (
        out.create(f"{samples.subset}/samples-{given.number:05d}.parquet") as file,
        pq.ParquetWriter(file, columns, compression="snappy", use_dictionary=False) as writer,
    ):
        for first, block, learned in given.blocks():
            runs = given.runs(first, len(block))
            writer.write_batch(batch(columns, block, runs, learned), len(block))
            written += block.size
    return written

"""One small program each: `PROGRAM INPUT.jsonl FOLDER TOKENIZER.json SEQ_LEN`; its last line is JSON.

There `ids` counts every id the tokenizer gave, whatever the pipeline then does with them.
"""

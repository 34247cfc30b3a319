"""Conversations, chat templates in the manners of the field, and small trained tokenizers that come with them."""

import json
import random

from runs import _row, lines

CONTROL = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<s>", "</s>"]

TEMPLATES = {
    # Turns between markers; a reply and its end are learned.
    "turns": """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor -%}
{{ '<|im_end|>\n' }}{% endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ (message.content or '') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else -%}
{{ message.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
""",
    # The same without saying what is learned.
    "silent": """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
""",
    # Instructions in brackets and replies bare, with checks; a namespace, a loop that breaks off.
    "brackets": """
{%- set ns = namespace(turn=0) -%}
{{ bos_token }}
{%- for message in messages -%}
{%- if message.role not in ['user', 'assistant'] -%}{{ raise_exception('only user and assistant') }}{%- endif -%}
{%- if (message.role == 'user') != (ns.turn % 2 == 0) -%}{{ raise_exception('roles must take turns') }}{%- endif -%}
{%- if message.role == 'user' -%}
{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else -%}
{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
{%- endif -%}
{%- set ns.turn = ns.turn + 1 -%}
{%- if loop.index > 50 -%}{% break %}{%- endif -%}
{%- endfor -%}
""",
    # No special tokens at all.
    "words": """
{%- for message in messages -%}
{{ message.role | capitalize }}: {% if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}
{% endgeneration %}{% else %}{{ message.content | trim }}
{% endif %}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif -%}
""",
    # Reasoning is shown in the last reply only, as some do.
    "forgetful": """
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content and loop.last -%}{{ '(' + message.reasoning_content + ') ' }}{%- endif -%}
{{ message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
""",
}


def train(kind="byte-level", seed=0):
    """A small tokenizer.json, as text: byte-level as Qwen's, trimmed as GPT-2's and Llama 3's, wordpiece as BERT's, or
    sentence as Llama 2's; the last two cannot say how many bytes an id stands for."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    unknown = {"unk_token": "<unk>"} if kind in ("wordpiece", "sentence") else {}
    model = (
        models.WordPiece(**unknown) if kind == "wordpiece" else models.BPE(**unknown, byte_fallback=kind == "sentence")
    )
    tokenizer = Tokenizer(model)
    alphabet = []
    if kind == "wordpiece":
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer
    else:
        trainer = trainers.BpeTrainer
    if kind == "sentence":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    elif kind != "wordpiece":
        tokenizer.normalizer = normalizers.NFC() if kind == "byte-level" else None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=kind == "trimmed")
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [row["text"] for row in map(_row, lines(seed, 20_000)) if row]
    specials = [*unknown.values(), *CONTROL, *(alphabet if kind == "sentence" else [])]
    letters = [] if kind == "sentence" else alphabet
    tokenizer.train_from_iterator(
        texts,
        trainer(vocab_size=700, special_tokens=specials, initial_alphabet=letters, show_progress=False),
    )
    return tokenizer.to_str()


def write_tokenizer(folder, template="turns", kind="byte-level", **config):
    """A folder as `save_pretrained` makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(train(kind), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        **({"chat_template": TEMPLATES.get(template, template)} if template else {}),
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


PLAIN = "the mill stands by a stream; water 42 turns; wheel, Rad – 水车 🙂 é don't 1,024 (x) {y} <z> [INST]"
WORDS = [*PLAIN.split(" "), "\n\t", ""]


def text(rng, most=12):
    """Words that begin and end with letters of one byte, so that no id at an end stands for less than a letter."""
    return " ".join(["Ah", *rng.choices(WORDS, k=rng.randrange(most)), "so"])


def conversation(rng, turns=None):
    """Messages that take turns, a reply last."""
    messages = []
    for _ in range(turns or rng.randrange(1, 4)):
        messages.append({"role": "user", "content": text(rng)})
        messages.append({"role": "assistant", "content": text(rng, 30)})
    return messages


def rows(seed, count):
    """Conversations of every form, with ids."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        messages = conversation(rng)
        forms = [
            {"messages": messages},
            {"messages": [{"role": "user", "content": text(rng)}]},  # nothing to learn
            {"prompt": messages[:1], "completion": messages[1:]},
            {"prompt": text(rng), "completion": " " + text(rng, 200)},
            {"prompt": "", "completion": ""},
        ]
        made.append({"id": f"c{number}", **rng.choices(forms, weights=[6, 1, 2, 3, 0.3])[0]})
    return made

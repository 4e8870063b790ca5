"""Small tokenizers and hard texts for the tests of tokenizers."""

import json
import random
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
import tokenizers

LINES = [line for text in list(topics.values())[:40] for line in text.split("\n") if line]
FRAGMENTS = [
    *"abcdefghijetaoin      \n\t\r.,:;<>|[]/0123456789_-=#*",
    *("é", "e\u0301", "漢", "字", "\u3042", "한", "ก", "\u05d0", "\ufb01", "½", "\u1e9b\u0323"),
    *("🙂", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "\u200d", "\ufe0f", "\U0001f1e9\U0001f1ea"),
    *("\x00", "\x01", "\x1b[0m", "\x7f", "\u00a0", "\u2009", "\u3000", "\ufeff", "\U0010ffff"),
    *("\u2581", "\u2581\u2581", "the", "The ", " of", " ing", "<s", "s>", "<|prompt|>"),
    *("    ", "  ", "<sep>", "<sep", "<sep><sep2>", "sepp", "<0x0A>", "aaa", "...", "===", "\n\n"),
]


def train_sentencepiece(path: Path, **options) -> Path:
    """A SentencePiece model of 600 ids, in the manner of ours where no option says otherwise."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 2,
    }
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, **(settings | options)
        )
    return path


def random_texts(count: int, seed: int, fragments=tuple(FRAGMENTS)) -> list[str]:
    """Texts of up to forty random fragments."""
    rng = random.Random(seed)
    return ["".join(rng.choices(fragments, k=rng.randint(0, 40))) for _ in range(count)]


def byte_level_folder(folder: Path, config: dict | None = None, *, bos_first: bool = False) -> Path:
    """A Hugging Face folder with a byte-level BPE of 600 ids, in the manner of GPT-2's."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(LINES, trainer)
    if bos_first:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
        )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    if config is not None:
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder

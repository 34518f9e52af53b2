"""Small tokenizers of every kind that models come with."""

import io
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from megagrow.data.tokenizer import train_sentencepiece

TEXT = "the cat sat on the mat and the dog ate the food, then the bird sang\n"
MORE = "growing models while they train keeps what they have learnt é 你好\n"
END = "<|endoftext|>"


def byte_level(path: Path, *, size: int, texts: Sequence[str], special: Sequence[str] = ()) -> Path:
    """GPT-2's kind: BPE on bytes."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*special, END], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    made.save(str(path))
    return path


def extended(path: Path, old: Path, words: Sequence[str]) -> Path:
    """A tokenizer.json with more tokens behind the old ones, as `add_tokens` makes it."""
    made = tokenizers.Tokenizer.from_file(str(old))
    made.add_tokens(list(words))
    made.save(str(path))
    return path


def lossless(path: Path, *, size: int, texts: Sequence[str]) -> Path:
    """The SentencePiece model that megagrow trains."""
    path.write_bytes(train_sentencepiece(texts, vocab_size=size))
    return path


def llama_like(path: Path, *, size: int, texts: Sequence[str]) -> Path:
    """A SentencePiece model with a blank before every text, as LLaMA's."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, model_type="bpe", vocab_size=size,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(content.getvalue())
    return path

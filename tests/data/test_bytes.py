"""configs/tokenizers/bytes.json: one token per byte."""

from hypothesis import given
from hypothesis import strategies as st

from megagrow.data.tokenizer import load_tokenizer
from tests.jobs import REPOSITORY

BYTES = load_tokenizer(REPOSITORY / "configs" / "tokenizers" / "bytes.json")


@given(st.text())
def test_ids_are_the_bytes_of_a_text(text):
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.decode(list(text.encode())) == text


def test_documents_end_with_a_token_of_their_own():
    assert (BYTES.vocab_size, BYTES.eod, BYTES.name(256)) == (257, 256, "<|endoftext|>")
    assert BYTES.encode("<|endoftext|>") == list(b"<|endoftext|>")

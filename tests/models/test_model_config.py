import pytest
from pydantic import ValidationError

from megagrow.config import ModelConfig


def make(**changes):
    sizes = {"layers": 2, "hidden": 24, "heads": 4, "ffn": 32, "sequence": 8}
    return ModelConfig(**(sizes | changes))


def refusal(**changes):
    with pytest.raises(ValidationError) as caught:
        make(**changes)
    return str(caught.value)


def test_defaults_are_plain_multi_head_attention():
    model = make()
    assert (model.kv_groups, model.head_dim, model.architecture.biases) == (4, 6, "all")
    assert make(family="llama").architecture.biases == "none"


def test_heads_must_divide_hidden_unless_their_width_is_given():
    message = refusal(hidden=26)
    assert "hidden = 26 is not divisible by heads = 4" in message
    assert "for instance 24" in message and "model.head_dim" in message
    assert make(hidden=26, head_dim=10).head_dim == 10


def test_kv_heads_must_divide_heads():
    assert make(kv_heads=2).kv_groups == 2
    assert "heads = 4 is not divisible by kv_heads = 3" in refusal(kv_heads=3)
    assert "model.kv_heads to a divisor of 4" in refusal(kv_heads=8)


def test_rotary_heads_are_even():
    message = refusal(family="llama", head_dim=5)
    assert "head_dim = 5 is odd" in message and "for instance 6" in message
    assert make(family="gpt2", head_dim=5).head_dim == 5


def test_one_number_is_the_std_of_all():
    assert make().stds == (0.02, 0.02, 0.02, 0.02)
    assert make(init_std=0.3).stds == (0.3, 0.3, 0.3, 0.3)


def test_by_role_what_is_not_given_has_its_default():
    assert make(init_std={}, tie_embeddings=False).stds == (0.5, 0.5, 0.02, 0.02)
    # Logits scale with a token embedding that is tied to the head.
    assert make(init_std={}).stds == (0.02, 0.02, 0.02, 0.02)
    given = {"embedding": 0.3, "matrices": "fan_in"}
    assert make(init_std=given).stds == (0.3, 0.3, 0.02, None)
    given |= {"position": 0.1, "head": 0.7}
    assert make(init_std=given, tie_embeddings=False).stds == (0.3, 0.1, 0.7, None)


def test_a_tied_head_has_no_std_of_its_own():
    message = refusal(init_std={"head": 0.1})
    assert "the head is the token embedding" in message and "init_std.embedding" in message


def test_it_is_read_as_it_was_written():
    model = make(family="llama", head_dim=10, kv_heads=2, rope_theta=5e5, compile=True)
    written = model.model_dump()
    assert written["head_dim"] == 10 and "head_dim_" not in written
    assert ModelConfig(**written) == model
    assert ModelConfig(**make().model_dump()) == make()
    by_role = make(init_std={"embedding": 0.5, "matrices": "fan_in"})
    assert ModelConfig(**by_role.model_dump()) == by_role

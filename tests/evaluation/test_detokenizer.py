"""WikiText's lines in ordinary spelling, compared with the published detokenizer's output."""

from __future__ import annotations

import re

import pytest

from megagrow.evaluation.detokenizer import wikitext_detokenized

SPELLED = [
    ("the 2 @,@ 000 @-@ page book", "the 2,000-page book"),
    ("it is , he said ; no !", "it is, he said; no!"),
    ("( see below ) and [ this ]", "(see below) and [this]"),
    ('he said " yes " twice', 'he said "yes" twice'),
    ("the dog 's tail does n't", "the dog's tail doesn't"),
    (" = = Heading = = \n", "== Heading ==\n"),
    ("at 12 ° N , 3 @.@ 5 m", "at 12°N, 3.5 m"),
    (
        "soldiers ' weapons and the officers ' horses",
        "soldiers' weapons and the officers' horses",
    ),
    ("the soldiers ' weapons .", "the soldiers' weapons."),
    ("they said ' yes ' .", "they said 'yes'."),
    ("the ' big dogs ' barked", "the 'big dogs' barked"),
    ("this is ' great ' stuff", "this is 'great' stuff"),
    ("he said ' the soldiers ' guns fell ' and left", "he said 'the soldiers' guns fell' and left"),
    ("the soldiers ' view is ' great ' here", "the soldiers' view is 'great' here"),
    ("' one ' and ' two '", "'one' and 'two'"),
    ("rock ' n roll", "rock ' n roll"),
    ("James ' \n ' red ' \n", "James'\n'red'\n"),
]


@pytest.mark.parametrize(("marked", "plain"), SPELLED)
def test_wikitext_in_ordinary_spelling(marked: str, plain: str) -> None:
    assert wikitext_detokenized(marked).strip() == plain.strip()


def published(text: str) -> str:
    """The rules of Megatron-LM's detokenizer, in their order."""
    first = [("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
    last = [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")]
    last += [(" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]
    for old, new in [*first, *((f" {mark} ", f"{mark} ") for mark in ":;.!?,")]:
        text = text.replace(old, new)
    text = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for old, new in last:
        text = text.replace(old, new)
    return text


def test_ordinary_lines_are_as_the_published_detokenizer_makes_them() -> None:
    text = (
        " = Valkyria Chronicles III = \n \n Senjō no Valkyria 3 ( Japanese : 3 , lit . Valkyria "
        "of the Battlefield 3 ) , commonly referred to as Valkyria Chronicles III outside Japan , "
        "is a tactical role @-@ playing video game . \n Released in January 2011 , it sold 2 @,@ "
        '000 @,@ 000 ; the game \'s " BLiTZ " system was [ sic ] praised : 9 @.@ 5 of 10 ! \n \n '
        "= = Gameplay = = \n \n = = = The soldiers ' weapons = = = \n At 35 ° north , is it ? \n"
    )
    assert wikitext_detokenized(text) == published(text)

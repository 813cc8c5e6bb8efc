"""The form of a text, guessed."""

from __future__ import annotations

import textwrap

import pytest

from mlm.spelling import guess_form

STORY = (
    "The keeper of the lamp had not slept. He climbed the stair, counted the steps, and found that "
    "one was missing. Nobody had ever told him how many there were, and yet he was sure of it. So "
    "he went down again and began to count from the bottom, aloud, with a finger on the wall.\n"
)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("plain", STORY * 3),
        ("plain", "Hello, world."),
        ("plain", "A line of verse,\nAnd one more,\nThe third is worse,\nSo close the door.\n"),
        (
            "plain",
            "Well, he said, and no more than that, for a while.\nYes.\nWhy?\nI asked.\nSo.\n",
        ),
        ("plain", ""),
        ("plain", "#one tag and\n#another\n"),
        ("wrapped", "\n\n".join(textwrap.fill(STORY, 70) for _ in range(3))),
        ("wrapped", "\r\n".join(textwrap.fill(STORY * 3, 60).splitlines())),
        ("markdown", "# The lamp\n\n" + STORY),
        ("markdown", STORY + "\n```\ncode\n```\n"),
        ("markdown", "Intro\n\n## Part\n" + textwrap.fill(STORY, 70)),
        ("wikitext", " \n = Lamp = \n \n The keeper , who slept . \n"),
        ("wikitext", "= = A part = =\n"),
        ("wikitext", "The keeper , old and well @-@ known , slept . \n"),
        ("wikitext", "One , two , three , four . Five . \n"),
    ],
)
def test_forms(form: str, text: str) -> None:
    assert guess_form(text) == form
    assert guess_form("\ufeff" + text) == form


def test_only_the_start_counts() -> None:
    assert guess_form("word " * 5000 + "\n# A heading\n") == "plain"

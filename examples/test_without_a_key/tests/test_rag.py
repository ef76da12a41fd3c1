"""The retrieval finds the right passages. Run with ``pytest --embedonce=replay``, this needs no key and no service."""

import pytest
from handbook.passages import PASSAGES
from handbook.search import find_passages, make_prompt

from embedonce import Cache


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How many holidays do I have?", "30 days of paid vacation"),
        ("My notebook was stolen. What now?", "lost laptop"),
        ("I have a fever and cannot come to work.", "If you are ill"),
        ("How much may I spend on dinner?", "Meals on business trips"),
    ],
    ids=["vacation", "theft", "illness", "meals"],
)
def test_the_nearest_passage_answers_the_question(embedonce_cache: Cache, question: str, answer: str) -> None:
    nearest, _ = find_passages(embedonce_cache, PASSAGES, question)
    assert answer in nearest


def test_the_prompt_has_the_passages(embedonce_cache: Cache) -> None:
    question = "Is the train to the customer paid?"
    prompt = make_prompt(find_passages(embedonce_cache, PASSAGES, question), question)
    assert "second class" in prompt
    assert prompt.endswith(question)

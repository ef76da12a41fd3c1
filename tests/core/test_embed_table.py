"""The table ``[embed]``: which fields ``embedonce embed`` reads and keeps."""

from __future__ import annotations

from typing import Any

import pytest

from embedonce.config import load, schema
from embedonce.errors import ConfigError

BEGIN = '[provider]\ntype = "ngram"\n[[tiers]]\ntype = "memory"\n[embed]\n'


def load_text(folder: Any, text: str) -> Any:
    path = folder / "embedonce.toml"
    path.write_text(BEGIN + text)
    return load(path)


def test_fields_and_keep_are_read_and_shown(tmp_path: Any) -> None:
    config = load_text(tmp_path, 'fields = { "*.csv" = "answer", "*.jsonl" = "content" }\nkeep = ["id"]\n')
    assert config.embed.fields == {"*.csv": "answer", "*.jsonl": "content"}
    assert list(config.embed.keep) == ["id"]
    shown = {setting.name: setting.value for setting in config.settings()}
    assert shown["embed.fields"] == {"*.csv": "answer", "*.jsonl": "content"}
    assert load_text(tmp_path, "").embed.fields is None


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ('fields = { "[" = "answer" }', ":6:", "is not a valid pattern"),
        ('fields = { "" = "answer" }', ":6:", "must not be empty"),
        ('fields = { "!a" = "answer" }', ":6:", "must not begin with !"),
        ('fields = { "*.csv" = "" }', ":6:22:", "name of a field"),
        ('fields = ["a"]', ":6:10:", "must be a table"),
        ('keep = [""]', ":6:9:", "name of a field"),
        ('keep = "id"', ":6:8:", "must be a list"),
        ('feilds = { "*.csv" = "a" }', ":6:1:", 'did you mean "fields"?'),
    ],
)
def test_problems_have_their_place(tmp_path: Any, text: str, place: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    (problem,) = caught.value.problems
    assert place in str(problem)
    assert words in str(problem)


def test_the_schema_describes_the_table() -> None:
    import jsonschema

    config: Any = {"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}]}
    jsonschema.validate({**config, "embed": {"fields": {"*.csv": "a"}, "keep": ["id"]}}, schema())
    for wrong in ({"fields": {"*.csv": ""}}, {"fields": ["a"]}, {"keep": [""]}, {"feilds": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**config, "embed": wrong}, schema())

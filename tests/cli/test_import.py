"""``embedonce import``: what is verified, stored and counted, and how a run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installed_plugins import write_distribution
from patience import wait_until

import embedonce
from embedonce import hookspecs
from embedonce.testing import CountingProvider

IMPORTERS = ("shelf", "pile", "drawer", "cupboard", "wire")
TEXTS = [f"text {number}" for number in range(50)]


def write_config(provider: str = "", more: str = "", tiers: str = '[[tiers]]\ntype = "disk"\npath = "vectors"') -> None:
    Path("embedonce.toml").write_text(
        f'{more}\n[provider]\ntype = "logging"\nlog = "computed.jsonl"\n{provider}\n{tiers}\ntimeout = "60s"\n'
    )


@pytest.fixture
def site(folder: Path) -> Path:
    """A folder with the plugins of ``import_probe``. The current folder has a configuration with a disk tier."""
    site = folder / "site"
    code = "from import_probe import embedonce_importers"
    write_distribution(
        site, "probe_importers", code, plugins=IMPORTERS, distribution="probe", group=hookspecs.IMPORTERS
    )
    code = "from import_probe import embedonce_providers"
    write_distribution(site, "probe_provider", code, plugins=["logging"], distribution="probe-provider")
    write_config()
    return site


@pytest.fixture
def run(site: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run ``embedonce import`` with the plugins of ``import_probe``."""
    monkeypatch.syspath_prepend(str(site))
    return lambda *arguments, **options: command("import", *arguments, **options)


def make_vectors(
    texts: Sequence[str], *, model: str = "counting", task: str = "document", symmetric: bool = True
) -> list[list[float]]:
    provider = CountingProvider(model=model, symmetric=symmetric)
    return [provider.vector_of(text, task).tolist() for text in texts]


def write_shelf(texts: Sequence[Any] = TEXTS, vectors: Sequence[Any] | None = None, name: str = "shelf.jsonl") -> None:
    vectors = make_vectors(texts) if vectors is None else vectors
    rows = [{"text": text, "vector": vector} for text, vector in zip(texts, vectors, strict=True)]
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def read_stored(texts: Sequence[str] = TEXTS, task: str = "document") -> dict[str, list[float]]:
    """Return the vectors in the tiers."""
    with embedonce.open("embedonce.toml") as cache:
        rows = cache.lookup(list(texts), task=task).rows
    return {text: row.tolist() for text, row in zip(texts, rows, strict=True) if row is not None}


def list_computed() -> list[tuple[str, str]]:
    log = Path("computed.jsonl")
    return [(task, text) for task, text in map(json.loads, log.read_text().splitlines())] if log.exists() else []


# --- what is stored and counted ---------------------------------------------------------------


def test_a_source_is_stored_and_only_the_verification_is_computed(run: Any) -> None:
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["seconds"] > 0
    assert 0 <= done.json["spent"]["seconds"] < 60
    assert done.json | {"seconds": 0, "spent": 0} == {
        "source": "the shelf shelf.jsonl",
        "importer": "shelf",
        "task": "document",
        "dry_run": False,
        "found": 50,
        "imported": 50,
        "already_there": 0,
        "different": 0,
        "changed": 0,
        "unreadable": {},
        "invalid": {},
        "passages": None,
        "missing": None,
        "failed": 0,
        "failures": [],
        "verified": 20,
        "equal": 20,
        "cosine": 1.0,
        "causes": [],
        "spent": 0,
        "trouble": {},
        "tier_causes": {},
        "unstored": {},
        "seconds": 0,
        "stopped": None,
    }
    assert read_stored() == dict(zip(TEXTS, make_vectors(TEXTS), strict=True))
    computed = list_computed()
    assert len(set(computed)) == len(computed) == 20
    assert {task for task, _ in computed} == {"document"}


def test_a_repeated_import_stores_nothing_more(run: Any) -> None:
    write_shelf(TEXTS[:30])
    assert run("shelf.jsonl", "--from", "shelf").code == 0
    write_shelf()
    again = run("shelf.jsonl", "--from", "shelf", "--json")
    assert (again.code, again.json["imported"], again.json["already_there"]) == (0, 20, 30)
    assert run("shelf.jsonl", "--from", "shelf", "--json").json["already_there"] == 50


def test_a_text_keeps_the_vector_that_a_tier_has(run: Any) -> None:
    with embedonce.open("embedonce.toml") as cache:
        other = np.ones((2, 8), np.float32)
        cache.put(TEXTS[:2], other)
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--json").json
    assert (done["imported"], done["already_there"], done["different"]) == (48, 0, 2)
    assert read_stored()[TEXTS[0]] == [1.0] * 8


def test_every_row_is_checked_and_counted(run: Any) -> None:
    write_config(more='[key]\nnormalize = ["strip"]')
    good = make_vectors(TEXTS)
    other = good[0]
    texts: list[Any] = [*TEXTS, "none", "short", "nan", "zeros", "words", "nested", " padded", 7, "odd \ud800"]
    texts += ["unreadable", TEXTS[0], TEXTS[1]]
    bad = [None, [1.0, 2.0], [float("nan")] * 8, [0.0] * 8, ["a"] * 8, [[1.0]] * 8, other, other, other]
    write_shelf(texts, [*good, *bad, "?", good[0], good[2]])
    for expected in ({"imported": 49, "already_there": 1}, {"imported": 0, "already_there": 50}):
        # The source has a text with two different vectors, which a verification might find.
        done = run("shelf.jsonl", "--from", "shelf", "--verify", "0", "--json")
        assert done.code == 0
        assert {
            key: done.json[key] for key in ("found", "changed", "different", "unreadable", "invalid", *expected)
        } == {
            "found": 61,
            "changed": 1,
            "different": 0,
            "unreadable": {"not a list": 1},
            "invalid": {
                "no vector": 1,
                "NaN, infinity or a number that is too large": 1,
                "only zeros": 1,
                "not a list of numbers": 2,
                "the text is not a str": 1,
                "the text is not valid Unicode": 1,
                "2 dimensions in place of 8": 1,
                "several different vectors of one text": 2,
            },
            **expected,
        }
    del good[1]
    assert read_stored([*TEXTS, "padded", "none", "short"]) == dict(zip([TEXTS[0], *TEXTS[2:]], good, strict=True))


def test_the_summary_for_people_has_every_count(run: Any) -> None:
    write_shelf([*TEXTS, "none", "unreadable"], [*make_vectors(TEXTS), None, "?"])
    lines = run("shelf.jsonl", "--from", "shelf").out.splitlines()
    assert lines[:-1] == [
        "51 texts found in the shelf shelf.jsonl",
        "            50 ( 98.0 %) imported",
        "             1 (  2.0 %) invalid: no vector",
        "1 value unreadable: not a list",
        "20 texts verified, the lowest cosine is 1.0",
        lines[5],
    ]
    assert lines[5].startswith("cost of the verification: ")
    assert lines[-1].endswith("texts/s")
    assert run("shelf.jsonl", "--from", "shelf", "--quiet").out == ""


def test_a_vector_that_the_dtype_cannot_hold_is_left_out(run: Any) -> None:
    write_config(more='[cache]\ndtype = "float16"')
    write_shelf([*TEXTS, "large"], [*make_vectors(TEXTS), [1e20] * 8])
    done = run("shelf.jsonl", "--from", "shelf", "--verify", "0", "--json").json
    assert (done["imported"], done["invalid"]) == (50, {"cannot be rounded to float16": 1})


# --- texts from files -------------------------------------------------------------------------


def test_the_texts_of_files_are_looked_up(run: Any) -> None:
    write_config(more='[key]\nnormalize = ["strip"]')
    write_shelf()
    Path("texts.csv").write_text("body;id\n" + "".join(f"  {text} ;1\n" for text in [*TEXTS[:30], TEXTS[0], "unknown"]))
    arguments = ("shelf.jsonl", "--from", "drawer", "--texts", "texts.csv", "--field", "body", "--delimiter", ";")
    done = run(*arguments, "--json")
    assert (done.code, done.err) == (0, "")
    counts = ("passages", "found", "imported", "missing", "verified", "failed")
    assert [done.json[name] for name in counts] == [32, 30, 30, 1, 20, 0]
    assert read_stored() == dict(zip(TEXTS[:30], make_vectors(TEXTS[:30]), strict=True))
    assert len(list_computed()) == 20
    again = run(*arguments)
    assert "32 passages read\n30 texts found in the shelf shelf.jsonl\n" in again.out
    assert "1 text missing in the source\n" in again.out


def test_texts_that_are_rare_in_the_source_are_verified(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce.cli.importing import reading

    monkeypatch.setattr(reading, "CANDIDATES", 4)
    write_shelf()
    lines = [f"unknown {number}" for number in range(500)] + TEXTS[:5]
    Path("texts.txt").write_text("\n".join(lines))
    done = run("shelf.jsonl", "--from", "shelf", "--texts", "texts.txt", "--split", "line", "--verify", "3", "--json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["verified"], done.json["found"], done.json["missing"]) == (3, 5, 500)


def test_a_file_that_cannot_be_read_is_reported_and_the_others_are_imported(run: Any) -> None:
    write_shelf()
    Path("texts.jsonl").write_text(f'{{"text": "{TEXTS[0]}"}}\n{{"text"\n{{"text": "odd \\ud800"}}\n')
    done = run("shelf.jsonl", "--from", "shelf", "--texts", "texts.jsonl", "--json")
    assert done.code == 1
    assert "texts.jsonl:2: not JSON" in done.err
    assert (done.json["imported"], done.json["failed"]) == (1, 2)
    assert "odd" not in done.err


def test_the_texts_must_be_readable_twice(run: Any) -> None:
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--texts", "-", input=TEXTS[0])
    assert (done.code, list_computed()) == (2, [])
    assert "--texts cannot be standard input (-), because the texts are read twice" in done.err
    done = run("shelf.jsonl", "--from", "shelf", "--texts", "-", "--verify", "0", "--json", input=TEXTS[0])
    assert (done.code, done.json["imported"]) == (0, 1)


def test_missing_files_and_conflicting_options_are_errors(run: Any) -> None:
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--texts", "nowhere.txt")
    assert (done.code, done.err) == (2, "error: nowhere.txt: no such file or folder\n")
    done = run("shelf.jsonl", "--from", "shelf", "--texts", "shelf.jsonl", "--delimiter", ";", "--quote", ";")
    assert (done.code, done.err) == (2, "error: --delimiter and --quote must be different characters\n")


def test_the_importer_decides_whether_texts_are_needed(run: Any) -> None:
    write_shelf()
    done = run("shelf.jsonl", "--from", "drawer")
    assert done.code == 2
    assert 'the importer "drawer" needs --texts, because the source holds no texts' in done.err
    done = run("shelf.jsonl", "--from", "pile", "--texts", "shelf.jsonl")
    assert done.code == 2
    assert "remove --texts" in done.err


# --- the verification -------------------------------------------------------------------------


def fail_verification(run: Any, *arguments: str) -> tuple[str, dict[str, Any]]:
    """Return the message and the summary of an import that stores nothing."""
    done = run("shelf.jsonl", "--from", "shelf", "--json", *arguments)
    assert (done.code, done.json["imported"]) == (1, 0)
    assert done.err.endswith("Nothing was imported.\n")
    assert done.json["stopped"] in done.err
    task = arguments[arguments.index("--task") + 1] if "--task" in arguments else "document"
    assert read_stored(task=task) == {}
    return done.err, done.json


def test_vectors_of_another_model_are_refused(run: Any) -> None:
    write_shelf(vectors=make_vectors(TEXTS, model="other"))
    message, summary = fail_verification(run)
    assert message.startswith(
        "error: cannot import from the shelf shelf.jsonl: its vectors are not those that the provider computes. 0 "
        "of 20 verified texts have equal vectors; the cosine is below 0.999 for 20 of 20 texts"
    )
    assert "Choose in [provider] the model" in message
    assert (summary["causes"], summary["verified"], summary["equal"]) == (["model"], 20, 0)
    assert summary["cosine"] < 0.999


def test_a_mixture_of_models_is_refused(run: Any) -> None:
    write_shelf(vectors=[*make_vectors(TEXTS[:25]), *make_vectors(TEXTS[25:], model="other")])
    message, summary = fail_verification(run, "--verify", "50")
    assert (summary["causes"], summary["verified"], summary["equal"]) == (["mixed"], 50, 25)
    assert "25 of 50 verified texts" in message


def test_vectors_of_other_dimensions_are_refused(run: Any) -> None:
    provider = CountingProvider(dimensions=4)
    write_shelf(vectors=[provider.vector_of(text).tolist() for text in TEXTS])
    for tells in ("true", "false"):
        write_config(f"tells_dimensions = {tells}")
        message, summary = fail_verification(run)
        assert "the source has vectors of 4 dimensions, and the provider returns 8" in message
        assert (summary["causes"], summary["cosine"]) == (["dimensions"], None)


@pytest.mark.parametrize("tells", ["true", "false"])
def test_single_vectors_of_other_dimensions_do_not_stop_the_others(run: Any, tells: str) -> None:
    write_config(f"tells_dimensions = {tells}")
    # Most vectors have other dimensions.
    write_shelf([*TEXTS, *"abc" * 30], [*make_vectors(TEXTS), *([[1.0, 2.0]] * 90)])
    done = run("shelf.jsonl", "--from", "shelf", "--json").json
    assert (done["imported"], done["verified"]) == (50, 20)
    assert done["invalid"] == {"2 dimensions in place of 8": 90}


def test_normalised_and_rounded_vectors_are_refused(run: Any) -> None:
    rows = np.array(make_vectors(TEXTS), np.float32)
    write_shelf(vectors=(rows / np.linalg.norm(rows, axis=1, keepdims=True)).tolist())
    assert fail_verification(run)[1]["causes"] == ["normalized"]
    write_shelf(vectors=rows.astype(np.float16).astype(np.float32).tolist())
    message, summary = fail_verification(run)
    assert summary["causes"] == ["precision"]
    assert 'set dtype = "float16"' in message
    write_config(more='[cache]\ndtype = "float16"')
    assert run("shelf.jsonl", "--from", "shelf", "--json").json["imported"] == 50


def test_vectors_of_another_task_are_recognised(run: Any) -> None:
    write_config("symmetric = false")
    write_shelf(vectors=make_vectors(TEXTS, task="query", symmetric=False))
    message, summary = fail_verification(run)
    assert summary["causes"] == ["task"]
    assert "Import them with --task query" in message
    assert [task for task, _ in list_computed()] == ["document"] * 20 + ["query"] * 3
    assert run("shelf.jsonl", "--from", "shelf", "--task", "query", "--json").json["imported"] == 50
    assert len(read_stored(task="query")) == 50
    assert read_stored() == {}


def test_a_source_with_vectors_of_another_task_is_refused_before_anything_is_computed(run: Any) -> None:
    write_shelf(vectors=make_vectors(TEXTS, symmetric=False))
    write_config("symmetric = false")
    done = run("shelf.jsonl", "--from", "shelf", "--option", "task_of=document", "--task", "query")
    assert done.code == 1
    assert 'cannot import from the shelf shelf.jsonl for the task "query"' in done.err
    done = run("shelf.jsonl", "--from", "shelf", "--option", "mixing=all tasks have the same keys")
    assert done.code == 1
    assert "all tasks have the same keys" in done.err
    assert list_computed() == []
    write_config()
    write_shelf()
    assert run("shelf.jsonl", "--from", "shelf", "--option", "mixing=all tasks have the same keys").code == 0


def test_a_failing_provider_says_nothing_about_the_source(run: Any) -> None:
    write_shelf()
    write_config("is_down = true")
    message, summary = fail_verification(run)
    assert "the vectors could not be verified, because the provider failed: ConnectionError" in message
    assert summary["causes"] == []


def test_texts_that_the_provider_refuses_are_not_compared(run: Any) -> None:
    write_shelf()
    write_config(f"refuses = {json.dumps(TEXTS[:45])}")
    done = run("shelf.jsonl", "--from", "shelf", "--verify", "50", "--json")
    assert (done.code, done.json["verified"], done.json["imported"]) == (0, 5, 50)
    assert "only 5 of 50 texts could be verified" in done.err


def test_without_a_verification_there_is_a_warning(run: Any) -> None:
    write_shelf(vectors=make_vectors(TEXTS, model="other"))
    done = run("shelf.jsonl", "--from", "shelf", "--verify", "0", "--json")
    assert (done.code, done.json["imported"], done.json["verified"], done.json["spent"]) == (0, 50, 0, None)
    assert done.err == ("warning: --verify 0: nothing proves that these are the vectors that the provider computes\n")
    assert list_computed() == []


def test_replay_mode_needs_no_verification(run: Any) -> None:
    write_shelf()
    write_config(more='[cache]\nmode = "replay"')
    done = run("shelf.jsonl", "--from", "shelf")
    assert done.code == 2
    assert "cannot be verified" in done.err
    done = run("shelf.jsonl", "--from", "shelf", "--verify", "0", "--dry-run", "--json").json
    assert (done["imported"], read_stored()) == (50, {})
    assert run("shelf.jsonl", "--from", "shelf", "--verify", "0", "--json").json["imported"] == 50


# --- a dry run --------------------------------------------------------------------------------


def test_a_dry_run_counts_the_same_and_stores_nothing(run: Any) -> None:
    first, second = (f'[[tiers]]\ntype = "disk"\npath = "{path}"\n' for path in ("first", "vectors"))
    write_config(tiers=f'{first}{second}name = "second"')
    tier = {"type": "disk", "path": "vectors", "timeout": "60s"}
    with embedonce.open({"provider": {"type": "logging", "log": "computed.jsonl"}, "tiers": [tier]}) as cache:
        cache.put(TEXTS[:10], np.array(make_vectors(TEXTS[:10]), np.float32))
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--dry-run", "--json")
    assert done.code == 0
    dry = done.json
    assert (dry["imported"], dry["already_there"], dry["verified"], dry["dry_run"]) == (40, 10, 20, True)
    with embedonce.open("embedonce.toml") as cache:
        # Nothing was copied from the slower tier to the faster tier either.
        assert {held.tier: held.entries for held in cache.contents()} == {"second": 10}
    assert "would be imported" in run("shelf.jsonl", "--from", "shelf", "--dry-run").out
    real = run("shelf.jsonl", "--from", "shelf", "--json").json
    varying = {"dry_run": 0, "spent": 0, "seconds": 0}
    assert real | varying == dry | varying


def test_a_dry_run_without_verification_computes_nothing(run: Any) -> None:
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--dry-run", "--verify", "0")
    assert (done.code, list_computed(), read_stored()) == (0, [], {})
    assert "nothing was stored\n" in done.out


# --- what goes wrong --------------------------------------------------------------------------


def test_nothing_found_is_an_error(run: Any) -> None:
    write_shelf([])
    done = run("shelf.jsonl", "--from", "shelf")
    assert (done.code, done.err) == (
        1,
        "error: found no vector that can be read in the shelf shelf.jsonl. Nothing was imported.\n",
    )
    write_shelf(["a", "b"], [None, "?"])
    for arguments in ([], ["--verify", "0"]):
        done = run("shelf.jsonl", "--from", "shelf", *arguments)
        assert done.code == 1
        assert "found 1 text in the shelf shelf.jsonl, but nothing that can be imported" in done.err
        assert "unreadable: not a list" in done.out
    Path("texts.txt").write_text("unknown")
    done = run("shelf.jsonl", "--from", "shelf", "--texts", "texts.txt")
    assert done.code == 1
    assert "found no vector for the 1 text of --texts in the shelf shelf.jsonl" in done.err


def test_a_missing_source_is_an_error(run: Any) -> None:
    done = run("nowhere.jsonl", "--from", "shelf")
    assert (done.code, done.err) == (
        1,
        'error: importer "shelf": there is no shelf nowhere.jsonl; check the path\n',
    )


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("client", 'importer "shelf": Connection refused'),
        ("bug", 'importer "shelf": the importer failed with an unexpected KeyError'),
        ("library", 'importer "shelf" needs the module a_library_that_is_missing, which is not installed'),
        ("strange", 'the importer "shelf" has returned a value of the type list, not FoundVectors'),
    ],
)
def test_errors_of_an_importer_are_messages(run: Any, failure: str, message: str) -> None:
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--option", f"fails={failure}")
    assert done.code in (1, 2)
    assert done.err.startswith(f"error: {message}")
    assert TEXTS[0] not in done.err
    assert read_stored() == {}


def test_an_importer_must_not_return_other_texts(run: Any) -> None:
    write_shelf()
    Path("texts.txt").write_text(TEXTS[0])
    done = run("shelf.jsonl", "--from", "shelf", "--texts", "texts.txt", "--option", "fails=unasked")
    assert (done.code, read_stored()) == (1, {})
    assert "has returned texts that it was not asked for" in done.err


def test_no_message_contains_a_secret(run: Any) -> None:
    for arguments in (
        ["shelf.jsonl", "--option", "password=hunter2"],
        ["drawer://me:hunter2@host/shelf.jsonl"],
    ):
        done = run(*arguments, "--from", "shelf", "--option", "fails=source")
        assert done.code == 1
        assert "hunter2" not in done.err
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--option", "password=hunter2", "--option", "fails=source")
    assert (done.code, done.err) == (
        1,
        'error: importer "shelf": (message hidden, because it contains a secret)\n',
    )
    done = run("shelf.jsonl", "--from", "shelf", "--option", "password=leak")
    assert done.code == 2
    assert "leak" not in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--from", "shlef"], 'no importer "shlef" is installed; did you mean "shelf"?'),
        (["a", "--from", "memory"], 'no importer "memory" is installed'),
        (
            ["a", "--from", "shelf", "--option", "shelv=x"],
            '--option "shelv": the importer "shelf" has no such option; did',
        ),
        (["a", "--from", "shelf", "--option", "zzz=x"], "no such option; valid options are path, url, shelf, rows,"),
        (["a", "--from", "shelf", "--option", "secret"], "--option must have the form NAME=VALUE"),
        (["a", "--from", "shelf", "--option", "rows=ten"], '--option rows: "ten": must be a whole number'),
        (["a", "--from", "shelf", "--option", "shelf=lowr"], '--option shelf: "lowr": must be "upper" or "lower"'),
        (["a", "--from", "shelf", "--option", "rows=1", "--option", "rows=1"], "--option rows: it is given twice"),
        (["a", "--from", "shelf", "--option", "path=b"], "--option path: SOURCE sets it already"),
        (
            ["a", "--from", "shelf", "--option", "task=query"],
            "--option task is not an option of an importer; use --task",
        ),
        (["", "--from", "shelf"], "SOURCE: must not be empty"),
        (
            ["redis://a", "--from", "langchain"],
            'SOURCE must be a path without ://, because the importer "langchain" reads files',
        ),
        (["a", "--from", "wire"], 'SOURCE must be a URL with ://, because the importer "wire" reads from a server'),
        (["wire://a", "--from", "wire"], '--option size=VALUE is missing for the importer "wire"'),
        (["wire://a ", "--from", "wire", "--option", "size=1"], "SOURCE: "),
        (["a", "--from", "cupboard", "--option", "place=a"], "has neither an option path nor an option url"),
    ],
)
def test_wrong_arguments_are_explained(run: Any, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""


def test_problems_of_options_are_a_json_document(run: Any) -> None:
    done = run("a", "--from", "shelf", "--option", "rows=ten", "--option", "zzz=1", "--json")
    assert (done.code, done.json["ok"], len(done.json["problems"])) == (2, False, 2)


def test_an_unknown_task_is_an_error_of_the_provider(run: Any) -> None:
    Path("embedonce.toml").write_text('[provider]\ntype = "ngram"\n[[tiers]]\ntype = "disk"\npath = "vectors"\n')
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--task", "qurey")
    assert done.code == 2
    assert "qurey" in done.err


def test_a_url_is_given_to_the_option_url(run: Any) -> None:
    write_shelf()
    assert run("wire://shelf.jsonl", "--from", "wire", "--option", "size=1", "--json").json["imported"] == 50


def test_imported_vectors_must_outlive_the_process(run: Any) -> None:
    write_shelf()
    for tiers in ('[[tiers]]\ntype = "memory"', '[[tiers]]\ntype = "disk"\npath = "vectors"\nwrite = "none"'):
        Path("embedonce.toml").write_text(f'[provider]\ntype = "ngram"\n{tiers}\n')
        done = run("shelf.jsonl", "--from", "shelf")
        assert done.code == 2
        assert "the imported vectors would be lost; add a disk tier" in done.err


def test_a_tier_that_stores_nothing_ends_the_import(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce.cli.importing import reading
    from embedonce_backends.disk import DiskBackend

    def fail(self: Any, items: Any, ttl: float | None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskBackend, "set_many", fail)
    write_shelf()
    done = run("shelf.jsonl", "--from", "shelf", "--json")
    assert (done.code, done.json["unstored"], done.json["stopped"]) == (1, {"disk": 50}, None)
    assert "error: tier disk did not store 50 of the imported vectors" in done.err
    assert "50 (100.0 %) of them not stored in every tier, reported above" in run("shelf.jsonl", "--from", "shelf").out
    monkeypatch.setattr(reading, "WINDOW", 10)
    monkeypatch.setattr("import_probe.PART", 10)
    done = run("shelf.jsonl", "--from", "shelf", "--json")
    assert (done.code, done.json["imported"], done.json["stopped"]) == (1, 20, "no tier stores the vectors")


# --- interruptions ----------------------------------------------------------------------------


def start_stopping(site: Path, process: Any, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start an import of 5,000 texts that stops after 3,000, and wait until it has stopped there."""
    texts = [f"text {number}" for number in range(5000)]
    write_shelf(texts)
    tests = Path(__file__).parents[1]  # the plugins import a module from there
    path = os.pathsep.join([str(site), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = process(
        "import", "shelf.jsonl", "--from", "shelf", "--option", "stop_after=3000", *arguments,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    wait_until(lambda: Path("shelf.stopped").exists() or child.poll() is not None)
    assert child.poll() is None, child.communicate()
    return child


def test_a_killed_import_goes_on_where_it_was(run: Any, site: Path, process: Any) -> None:
    child = start_stopping(site, process)
    child.kill()
    child.communicate()
    texts = [f"text {number}" for number in range(5000)]
    before = len(read_stored(texts))
    assert 2000 <= before <= 3000
    done = run("shelf.jsonl", "--from", "shelf", "--json").json
    assert (done["already_there"], done["imported"]) == (before, 5000 - before)
    assert read_stored(texts) == dict(zip(texts, make_vectors(texts), strict=True))
    assert len(list_computed()) == 40


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_import_says_how_to_go_on(site: Path, process: Any, signum: int, code: int) -> None:
    child = start_stopping(site, process, "--json")
    child.send_signal(signum)
    out, err = child.communicate()
    assert child.returncode == code
    assert err == (
        "interrupted. The vectors that were imported until then are stored. Run the same command again to continue.\n"
    )
    summary = json.loads(out)
    assert (summary["stopped"], summary["verified"]) == ("interrupted", 20)
    assert 2000 <= summary["imported"] <= 3000

"""The vectors of the n-gram provider follow its docstring bit for bit, on every platform, and are never zero."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedonce.testing import ProviderContract, Recipe
from embedonce_providers import ngram
from embedonce_providers.ngram import NgramProvider

GOLDEN = Path(__file__).parent / "golden" / "ngram.json"


class TestNgramProvider(ProviderContract):
    def make(self) -> NgramProvider:
        return NgramProvider()

    def recipe(self) -> Recipe:
        return Recipe(NgramProvider)


any_text = st.text(max_size=60)
# A small alphabet gives repeated runs, runs that cancel out, all kinds of white space, both cases, and other planes.
odd_text = st.text(alphabet="aAbé ÉßǅΣς\t\n\u00a0\u2003\u3000\ud7ff\U0001d4b3日İ\x00", max_size=12)


def to_hex(vector: np.ndarray[Any, Any]) -> str:
    return vector.astype("<f4").tobytes().hex()


def compute_reference(text: str, dimensions: int) -> bytes:
    """Compute the vector as the module's docstring says, run by run, in plain Python."""
    lowered = (fold_character(char) for char in text)
    words = "".join(" " if char.isspace() else char for char in lowered).split(" ")
    stream = " ".join(["", *filter(None, words), ""]) if any(words) else " "
    counts = Counter({0: 1} if stream == " " else {})
    for size in (3, 4):
        for at in range(len(stream) - size + 1):
            slot = (hash_run(stream[at : at + size]) * 2 * dimensions) >> 32
            counts[slot // 2] += 1 if slot % 2 else -1
    total = sum(map(abs, counts.values()))
    row = [math.copysign(math.sqrt(abs(counts[i]) / total), counts[i]) for i in range(dimensions)]
    return struct.pack(f"<{dimensions}f", *row)


def fold_character(char: str) -> str:
    cased = char < "\u0590" or "\u1e00" <= char < "\u2000"
    return char.casefold() if cased and len(char.casefold()) == 1 else char


def hash_run(run: str) -> int:
    value = 0
    for char in run:
        value = (value + ord(char)) * 0x9E3779B1 % 2**32
    value ^= len(run)
    value = (value ^ value >> 16) * 0x85EBCA6B % 2**32
    value = (value ^ value >> 13) * 0xC2B2AE35 % 2**32
    return value ^ value >> 16


@given(text=any_text | odd_text, dimensions=st.sampled_from([8, 9, 256]))
@example(text="", dimensions=8)
@example(text=" \u3000\n", dimensions=8)
@example(text="the the the the THE", dimensions=8)
@example(text="a" * 5000, dimensions=8)
def test_a_vector_is_what_the_docstring_says(text: str, dimensions: int) -> None:
    [vector] = NgramProvider(dimensions=dimensions).embed([text], "document")
    assert to_hex(vector) == compute_reference(text, dimensions).hex()


@given(texts=st.lists(any_text | odd_text, min_size=1, max_size=40))
@settings(max_examples=50)
def test_no_text_is_zero_and_every_vector_has_length_1(texts: list[str]) -> None:
    matrix = NgramProvider(dimensions=8).embed(texts, "document")
    assert matrix.dtype == np.float32
    assert matrix.shape == (len(texts), 8)
    assert np.abs(np.linalg.norm(matrix.astype(np.float64), axis=1) - 1).max() < 1e-6


def test_no_short_text_of_a_few_letters_cancels_out() -> None:
    """All texts of up to seven characters out of three, in few dimensions, where cancelling is most likely."""
    texts = ["".join(chars) for size in range(8) for chars in itertools.product("ab ", repeat=size)]
    matrix = NgramProvider(dimensions=8).embed(texts, "document")
    assert matrix.any(axis=1).all()


@given(texts=st.lists(any_text | odd_text, min_size=1, max_size=20), at=st.integers(0, 19))
@settings(max_examples=50)
def test_a_text_alone_and_in_a_batch_has_the_same_vector(texts: list[str], at: int) -> None:
    provider = NgramProvider(dimensions=16)
    text = texts[at % len(texts)]
    [alone] = provider.embed([text], "document")
    assert to_hex(provider.embed(texts, "query")[at % len(texts)]) == to_hex(alone)


def test_texts_longer_than_a_group_keep_their_place() -> None:
    provider = NgramProvider()
    texts = ["short", "x y" * ngram.CHARACTERS, "", *(f"text number {i}" for i in range(1500)), "long " * 9000, "end"]
    matrix = provider.embed(texts, "document")
    for at in (0, 1, 2, 3, 700, 1502, 1503, 1504):
        assert to_hex(matrix[at]) == to_hex(provider.embed([texts[at]], "document")[0])


@pytest.mark.parametrize("other", ["  one\ttwo\r\n three ", "ONE two Three", "one\u00a0two\u3000three"])
def test_white_space_and_case_are_ignored(other: str) -> None:
    one, two = NgramProvider().embed(["one two three", other], "document")
    assert to_hex(one) == to_hex(two)


def test_word_boundaries_matter() -> None:
    together, apart = NgramProvider().embed(["therapist", "the rapist"], "document")
    assert to_hex(together) != to_hex(apart)


def test_an_edited_text_is_near_and_another_is_far() -> None:
    text = "Return the absolute value of a number. The argument may be an integer or a floating point number."
    edited = "Returns the absolute value of the number; the argument may be an int or a floating-point number."
    other = "Open the file and read it line by line, or raise OSError where the operating system refuses."
    a, b, c = NgramProvider().embed([text, edited, other], "document")
    assert a @ b > 0.75
    assert a @ c < 0.4


def test_the_space_is_one_for_every_task_and_differs_by_dimensions() -> None:
    provider = NgramProvider()
    assert provider.space("document") == provider.space("query")
    assert provider.space("document").task is None
    assert provider.space("document").dimensions == 256
    assert provider.space("document").fingerprint() != NgramProvider(dimensions=255).space("document").fingerprint()


@pytest.mark.parametrize("dimensions", [-1, 0, 7, 8193])
def test_dimensions_outside_the_range_are_refused(dimensions: int) -> None:
    with pytest.raises(ValueError, match="between 8 and 8192"):
        NgramProvider(dimensions=dimensions)


# --- the same vectors everywhere ----------------------------------------------------------------

GOLDEN_TEXTS = {
    "empty": "",
    "blank": " \t\n",
    "one letter": "a",
    "sentence": "The quick brown fox jumps over the lazy dog.",
    "case": "THE QUICK Brown Fox",
    "latin": "Æsir Ça Élan ñandú straße Łódź ǅ",
    "greek and cyrillic": "ΣΊΣΥΦΟΣ Σίσυφος Война и Мир",
    "armenian": "ԵՐԵՎԱՆ Երևան",
    "left alone": "\u13a0 Ꮿ Ა ᲀ Ꚁ 𐐀 𞤀 Ⓐ",
    "chinese": "吾輩は猫である。名前はまだ無い。",
    "arabic": "بسم الله الرحمن الرحيم",
    "emoji": "👩‍👩‍👧 🇮🇸 ☕️",
    "white space": "a\u00a0b\u2003c\u2028d\u3000e\u200bf\u180eg",
    "control": "\x00\x01\x1c\x7f\x85",
    "repeated": "na " * 1000,
    "long": " ".join(str(number * number) for number in range(20_000)),
}


def compute_golden_values() -> dict[str, Any]:
    """Return the golden values, computed by this Python and numpy."""
    names, texts = list(GOLDEN_TEXTS), list(GOLDEN_TEXTS.values())
    made: dict[str, Any] = {}
    made["table"] = hashlib.sha256(ngram._folding_table().astype("<u4").tobytes()).hexdigest()
    made["fingerprint"] = NgramProvider().space("document").fingerprint().hex()
    made["16"] = dict(zip(names, map(to_hex, NgramProvider(dimensions=16).embed(texts, "document")), strict=True))
    made["256, sha256"] = {
        name: hashlib.sha256(bytes.fromhex(to_hex(row))).hexdigest()
        for name, row in zip(names, NgramProvider().embed(texts, "document"), strict=True)
    }
    return made


def test_the_golden_vectors_are_unchanged() -> None:
    assert compute_golden_values() == json.loads(GOLDEN.read_text())


def compute_golden_values_with(python: str, folder: Path, **environ: str) -> Any:
    """Return the golden values, computed by another interpreter.

    The two packages are copied, because installed packages have neighbours (numpy) that only this Python can import.
    """
    for module in (ngram, sys.modules["embedonce.keys"]):
        package = Path(str(module.__file__)).parent
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import importlib.util, json\n"
        f"spec = importlib.util.spec_from_file_location('golden', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(json.dumps(module.compute_golden_values()))\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(folder), **environ}
    done = subprocess.run([python, "-c", code], env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_vectors_do_not_depend_on_the_processors_extensions(tmp_path: Path) -> None:
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    if not found:
        pytest.skip("numpy uses no optional processor extension on this machine")
    plain = compute_golden_values_with(sys.executable, tmp_path, NPY_DISABLE_CPU_FEATURES=" ".join(found))
    assert plain == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_the_vectors_do_not_depend_on_the_python(version: str, tmp_path: Path) -> None:
    python = shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"no python{version} here")
    needs = "import numpy, hypothesis, pytest, xxhash, pluggy, annotated_types, typing_extensions"
    if subprocess.run([python, "-c", needs], capture_output=True, check=False).returncode:
        pytest.skip(f"python{version} has no numpy, or another package that embedonce needs")
    assert compute_golden_values_with(python, tmp_path) == json.loads(GOLDEN.read_text())

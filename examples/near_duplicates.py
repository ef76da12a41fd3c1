"""Find near-duplicates with the ngram provider, without a model, a network or a service.

    python examples/near_duplicates.py

The texts are the docstrings of the standard library. Each gets an edited copy: reflowed, with a tenth of its words
changed, swapped, misspelt, left out or in capitals. The near-duplicates of a copy are the originals whose cosine with
it is above a threshold. The right original is known, so the script can compute precision and recall. Then the script
shows pairs of near-duplicates in the library itself; because of them, precision is below 1.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import textwrap
import warnings
from pathlib import Path

import numpy as np

import embedonce
from embedonce_providers.ngram import NgramProvider

THRESHOLD = 0.85


def read_docstrings() -> list[str]:
    """Return the docstrings of 100 to 1,500 characters of the standard library's single-file modules."""
    found = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found.add(ast.get_docstring(node) or "")
    return sorted(text for text in found if 100 <= len(text) <= 1500)


def make_edited_copy(text: str, other_words: list[str], rng: random.Random) -> str:
    """Return a careless copy of the text: a tenth of its words edited, and the lines broken elsewhere."""
    words = text.split()
    for _ in range(max(1, len(words) // 10)):
        i = rng.randrange(len(words) - 1)
        kind = rng.choice(["change", "swap", "misspell", "leave out", "capitals"])
        if kind == "change":
            words[i] = rng.choice(other_words)
        elif kind == "swap":
            words[i], words[i + 1] = words[i + 1], words[i]
        elif kind == "misspell":
            words[i] = words[i][1:] + words[i][:1]
        elif kind == "leave out":
            words[i] = ""
        else:
            words[i] = words[i].upper()
    return textwrap.fill(" ".join(words), rng.choice([40, 60, 100]))


def compute_scores(originals: np.ndarray, copies: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return precision and recall of the pairs at or above the threshold. Copy *i* belongs to original *i*."""
    is_found = copies @ originals.T >= threshold
    right = int(is_found.diagonal().sum())
    return right / max(1, int(is_found.sum())), right / len(copies)


def main() -> dict[str, float]:
    """Print the scores; return those at THRESHOLD, and the share of copies whose best match is the right original."""
    rng = random.Random(2026)
    texts = read_docstrings()
    words = sorted({word for text in texts for word in text.split()})
    with embedonce.Cache(NgramProvider()) as cache:
        originals = cache.embed_batch(texts)
        copies = cache.embed_batch([make_edited_copy(text, words, rng) for text in texts])

    print(f"{len(texts)} docstrings, each with an edited copy, {originals.shape[1]} dimensions\n")
    print("threshold  precision  recall")
    for threshold in (0.7, 0.75, 0.8, 0.85, 0.9):
        precision, recall = compute_scores(originals, copies, threshold)
        print(f"{threshold:9.2f}  {precision:9.3f}  {recall:6.3f}")
    best = float(((copies @ originals.T).argmax(axis=1) == np.arange(len(texts))).mean())
    print(f"\nthe nearest original is the right one for {best:.1%} of the copies")

    similarity = np.triu(originals @ originals.T, k=1)
    pairs = np.argwhere((similarity >= THRESHOLD) & (similarity < 0.99))
    print(f"\nnear-duplicates in the library itself: {len(pairs)} pairs, three of them:")
    for one, other in pairs[:: max(1, len(pairs) // 3)][:3]:
        print(f"\n{similarity[one, other]:.2f}  {textwrap.shorten(texts[one], 100)}")
        print(f"      {textwrap.shorten(texts[other], 100)}")

    precision, recall = compute_scores(originals, copies, THRESHOLD)
    return {"precision": precision, "recall": recall, "nearest": best}


if __name__ == "__main__":
    main()

"""Find near-duplicates with the ngram provider: no model, no network, no service.

    python examples/near_duplicates.py

The texts are the docstrings of the standard library. Each gets an edited copy: reflowed, in places in
capitals, a tenth of its words changed, swapped, misspelt or left out. A copy's near-duplicates are the
originals whose cosine with it is above a threshold; the right one is known, so that precision and recall can
be counted. Then the pairs that are near-duplicates in the library itself are shown: they are also what makes
precision less than 1 above.
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


def docstrings() -> list[str]:
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


def edited(text: str, words_of_others: list[str], chance: random.Random) -> str:
    """Return the text as a careless copy: a tenth of its words edited, the lines broken elsewhere."""
    words = text.split()
    for _ in range(max(1, len(words) // 10)):
        at = chance.randrange(len(words) - 1)
        kind = chance.choice(["change", "swap", "misspell", "leave out", "capitals"])
        if kind == "change":
            words[at] = chance.choice(words_of_others)
        elif kind == "swap":
            words[at], words[at + 1] = words[at + 1], words[at]
        elif kind == "misspell":
            words[at] = words[at][1:] + words[at][:1]
        elif kind == "leave out":
            words[at] = ""
        else:
            words[at] = words[at].upper()
    return textwrap.fill(" ".join(words), chance.choice([40, 60, 100]))


def scores(originals: np.ndarray, copies: np.ndarray, threshold: float) -> tuple[float, float]:
    """Return precision and recall of the pairs at or above the threshold; copy *i* belongs to original *i*."""
    found = copies @ originals.T >= threshold
    right = int(found.diagonal().sum())
    return right / max(1, int(found.sum())), right / len(copies)


def main() -> dict[str, float]:
    """Print the scores, and return those at the threshold with how often the best match is the right one."""
    chance = random.Random(2026)
    texts = docstrings()
    words = sorted({word for text in texts for word in text.split()})
    with embedonce.Cache(NgramProvider()) as cache:
        originals = cache.embed_batch(texts)
        copies = cache.embed_batch([edited(text, words, chance) for text in texts])

    print(f"{len(texts)} docstrings, each with an edited copy, {originals.shape[1]} dimensions\n")
    print("threshold  precision  recall")
    for threshold in (0.7, 0.75, 0.8, 0.85, 0.9):
        precision, recall = scores(originals, copies, threshold)
        print(f"{threshold:9.2f}  {precision:9.3f}  {recall:6.3f}")
    best = float(((copies @ originals.T).argmax(axis=1) == np.arange(len(texts))).mean())
    print(f"\nthe nearest original is the right one for {best:.1%} of the copies")

    likeness = np.triu(originals @ originals.T, k=1)
    pairs = np.argwhere((likeness >= THRESHOLD) & (likeness < 0.99))
    print(f"\nnear-duplicates in the library itself: {len(pairs)} pairs, three of them:")
    for one, other in pairs[:: max(1, len(pairs) // 3)][:3]:
        print(f"\n{likeness[one, other]:.2f}  {textwrap.shorten(texts[one], 100)}")
        print(f"      {textwrap.shorten(texts[other], 100)}")

    precision, recall = scores(originals, copies, THRESHOLD)
    return {"precision": precision, "recall": recall, "nearest": best}


if __name__ == "__main__":
    main()

"""Find texts that are nearly the same, without comparing each with each.

Texts enter an `Index`; for another text it gives the numbers of those that are similar. MinHash
proposes pairs; their true Jaccard similarity, of the sets of their sequences of three words,
decides. Changing one word of a hundred leaves a similarity of 0.94. So 0.8 finds other wordings of
the same row, and not other answers to the same question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rensa import RMinHash, RMinHashLSH  # pyright: ignore[reportAttributeAccessIssue] - it has no stubs

SEQUENCE_WORDS = 3
THRESHOLD = 0.8  # similarity from which two texts are near-duplicates
HASHES = 128  # of a signature
SEED = 0
MOST_MISSED = 1e-3  # chance that a pair just similar enough is never compared

# A word; or one sign, in the scripts that write no space between words: Thai to Burmese, Khmer,
# Chinese, Japanese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[^\W{_UNSPACED}]+|\w")


def sequences(text: str) -> set[str]:
    """Return all sequences of SEQUENCE_WORDS words; the whole text, if it has fewer words."""
    words = WORD.findall(text.lower()) or [text]
    shifted = (words[start:] for start in range(SEQUENCE_WORDS))
    return set(map(" ".join, zip(*shifted, strict=False))) or {" ".join(words)}


def similarity(one: set[str], other: set[str]) -> float:
    """Return the Jaccard similarity: the size of the intersection over that of the union."""
    return len(one & other) / len(one | other)


class Index:
    """Texts, searchable for those similar to another text (MinHash with LSH). Picklable."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        # The MinHash estimate of a similarity s has a standard deviation of
        # sqrt(s (1 - s) / HASHES). Four of them below the threshold, a pair need not be compared.
        deviation = (threshold * (1 - threshold) / HASHES) ** 0.5
        self._least_estimate = threshold - 4 * deviation
        self.texts: list[str] = []
        self._minhashes: list[RMinHash] = []
        self._buckets = RMinHashLSH(threshold, HASHES, bands(threshold))

    def add(self, texts: list[str]) -> None:
        minhashes = RMinHash.from_token_sets(map(sequences, texts), HASHES, SEED)
        for text, minhash in zip(texts, minhashes, strict=True):
            self._buckets.insert(len(self.texts), minhash)
            self.texts.append(text)
            self._minhashes.append(minhash)

    def near(self, texts: list[str]) -> Iterator[list[tuple[int, float]]]:
        """Yield for each text its near-duplicates in the index: their numbers and similarities."""
        sets = [sequences(text) for text in texts]
        minhashes = RMinHash.from_token_sets(sets, HASHES, SEED)
        for own, minhash in zip(sets, minhashes, strict=True):
            alike = sorted(
                number
                for number in self._buckets.query(minhash)
                if minhash.jaccard(self._minhashes[number]) >= self._least_estimate
            )
            exact = ((number, similarity(own, sequences(self.texts[number]))) for number in alike)
            yield [(number, similar) for number, similar in exact if similar >= self._threshold]


def bands(threshold: float) -> int:
    """Return the number of bands that signatures are cut into for LSH.

    Texts that agree in one band are compared. So it is the smallest number that misses a pair at
    the threshold with a chance of at most MOST_MISSED: (1 - t ** rows) ** bands, see Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2.
    """
    for count in (16, 32, 64):
        if (1 - threshold ** (HASHES // count)) ** count <= MOST_MISSED:
            return count
    return HASHES

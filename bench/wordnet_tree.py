"""Writes the part of WordNet that the package ships: all that lies above ImageNet's classes.

    python -m bench.wordnet_tree /usr/share/wordnet

takes the folder of WordNet 3.0's noun database (`data.noun`, `noun.exc`, `cntlist.rev`), whose offsets are
ImageNet's identifiers, and the lists of classes that timm ships, and writes `tree.json.gz` beside the code
that reads it, `circuitvit/tasks/wordnet`. The same database gives the same bytes.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

import jsonschema

from circuitvit.models.timm_import import import_timm
from circuitvit.tasks.wordnet import FORMAT, SCHEMA, VERSION

OUT = Path(__file__).parents[1] / "circuitvit" / "tasks" / "wordnet" / "tree.json.gz"

ImageNetInfo = import_timm().data.ImageNetInfo

SUBSETS = ("imagenet-1k", "imagenet-12k", "imagenet-21k-goog", "imagenet-21k-miil", "imagenet-22k")

CLEAR = 5
"""A sense is a word's commonest where WordNet's texts have it this many times as often as all others."""

Nouns = dict[str, tuple[list[str], list[str], list[str]]]
"""Of each identifier the words, the keys under which these senses are counted, and the parents."""


def nouns(folder: Path) -> Nouns:
    """All nouns; the format is that of WordNet's manual page wndb(5)."""
    found: Nouns = {}
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields = line.partition("|")[0].split()
        last = 4 + 2 * int(fields[3], 16)
        words = fields[4:last:2]
        keys = [
            f"{word.lower()}%1:{fields[1]}:{int(number, 16):02}::"
            for word, number in zip(words, fields[5:last:2], strict=True)
        ]
        rest = fields[last + 1 :]
        parents = [f"n{rest[at + 1]}" for at in range(0, len(rest), 4) if rest[at] in ("@", "@i")]
        found[f"n{fields[0]}"] = [word.replace("_", " ") for word in words], keys, parents
    return found


def above(known: Nouns, classes: set[str]) -> list[str]:
    """The classes and everything that they are kinds of."""
    found, todo = set[str](), list(classes)
    while todo:
        if (name := todo.pop()) not in found:
            found.add(name)
            todo += known[name][2]
    return sorted(found)


def commonest(known: Nouns, kept: list[str], folder: Path) -> dict[str, str]:
    """Of words with several senses here, the one that is by far the most frequent in WordNet's own texts."""
    lines = (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines()
    seen = {key: int(count) for key, _, count in map(str.split, lines)}
    senses: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in kept:
        for word, key in zip(*known[name][:2], strict=True):
            senses[word.casefold()].append((seen.get(key, 0), name))
    found = {}
    for word, counted in sorted(senses.items()):
        counted.sort(reverse=True)
        if len(counted) > 1 and counted[0][0] > 1 and counted[0][0] >= CLEAR * sum(n for n, _ in counted[1:]):
            found[word] = counted[0][1]
    return found


def plurals(known: Nouns, kept: list[str], folder: Path) -> dict[str, str]:
    """The irregular ones, such as geese."""
    words = {word.casefold() for name in kept for word in known[name][0]}
    lines = (folder / "noun.exc").read_text(encoding="utf-8").replace("_", " ").splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines]
    return {many: one for many, one in pairs if one in words and many not in words}


def main(folder: Path) -> None:
    known = nouns(folder)
    classes = {name for subset in SUBSETS for name in ImageNetInfo(subset).label_names()}
    if missing := sorted(classes - set(known)):
        print(f"not in WordNet 3.0: {', '.join(missing)}")
    kept = above(known, classes & set(known))
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "source": "WordNet 3.0, Copyright 2006 by Princeton University; see LICENSE beside this file",
        "synsets": {name: [", ".join(known[name][0]), *known[name][2]] for name in kept},
        "commonest": commonest(known, kept, folder),
        "plurals": plurals(known, kept, folder),
        "imagenet": ImageNetInfo("imagenet-1k").label_names(),
    }
    jsonschema.validate(tree, SCHEMA)
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False)
    OUT.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(kept)} synsets, {OUT.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

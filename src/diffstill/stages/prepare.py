"""prepare: real images, validated, cropped, split and cut into shards."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from diffstill.artifacts import Rows, WorkFolder, new_artifact, read_ahead, refuse_foreign
from diffstill.config import PrepareConfig
from diffstill.datasets import Dataset, Rejected, load, read_pieces, refuse_emptied, refuse_many_bad
from diffstill.errors import DiffstillError
from diffstill.imagenet import title_of
from diffstill.record import Record, ignore

log = logging.getLogger("diffstill")
REJECTED = "rejected"
SHOWN = 3
"""Files, and kinds of files, that a line in the log names."""


def prepare(config: PrepareConfig, *, images: Path, data: Path | None = None, record: Record = ignore) -> dict[str, float]:
    """Write the `images` artifact: shards of train, val and test, the class map and the lists of rejected files and of those left out.

    The data lie in `data` where that is given, else where `config.location` says. Finished shards of a killed run are
    kept, as long as names, sizes and times of the files stay the same. Returns the number of images per split and of
    rejected files, and of files left out for they are no images. Raises `DiffstillError` on data that break a rule; an earlier artifact at `images` is left as it was then.
    """
    refuse_foreign(images, "images")
    dataset = load(config.model_copy(update={"location": str(data)}) if data else config, record)
    alike = config.model_copy(update={"max_bad_fraction": 0.0})  # it changes no image
    with WorkFolder("prepare", alike, {}, dataset.fingerprint, wait=True) as work:
        rejected = _read_all(dataset, config, work, record)
        listed = [{"file": dataset.names[row], "reason": rejected[row]} for row in sorted(rejected)]
        _write_json(work.folder / "rejected.json", listed)
        refuse_many_bad(dataset, rejected, config.max_bad_fraction, work.folder / "rejected.json")
        refuse_emptied(dataset, rejected)
        with new_artifact(images, "images", config, {}) as draft:
            for piece in dataset.pieces(config.shard_size):
                work.place(piece.name, draft.folder)
            _refuse_blank(draft.folder)
            _write_json(draft.folder / "classes.json", [_described(name, label) for label, name in enumerate(dataset.classes)])
            _write_json(draft.folder / "rejected.json", listed)
            _write_json(draft.folder / "left_out.json", [dataclasses.asdict(one) for one in dataset.left_out])
            draft.facts.update(_facts(dataset, rejected, config))
        work.clear()
    _tell("could not be read", [Rejected(**one) for one in listed], images / "rejected.json")
    _tell("left out", dataset.left_out, images / "left_out.json")
    counts = dataset.counts(rejected)
    images_of = {f"{split}_images": float(sum(own.values())) for split, own in counts.items()}
    return images_of | {"rejected": float(len(rejected)), "left_out": float(len(dataset.left_out))}


def _tell(what: str, files: Sequence[Rejected], path: Path) -> None:
    """No file is passed over in silence."""
    if files:
        kinds = Counter(Path(one.file).suffix or ("folder" if one.file.endswith("/") else "no suffix") for one in files).most_common(SHOWN)
        counts = ", ".join(f"{count} {ascii(kind)[1:-1]}" for kind, count in kinds)
        shown = "; ".join(f"{one.file!r}: {one.reason}" for one in files[:SHOWN])
        log.warning("%d file%s %s (%s), such as %s; all are listed in %s", len(files), "s" * (len(files) > 1), what, counts, shown, path)


def _read_all(dataset: Dataset, config: PrepareConfig, work: WorkFolder, record: Record) -> dict[int, str]:
    """Keep every piece in `work`; the rejected images. Two pieces are in memory at a time."""
    pieces = dataset.pieces(config.shard_size)
    noted = {line["piece"]: line["rejected"] for line in work.lines(REJECTED)}
    left = [piece for piece in pieces if piece.name not in noted or not work.holds(piece.name)]
    for piece in left:
        noted.pop(piece.name, None)
    rejected = {int(row): reason for of_piece in noted.values() for row, reason in of_piece.items()}
    total, warned = len(dataset.labels), False
    done = total - sum(len(piece.rows) for piece in left)
    with (
        record.progress("prepare", total, "img", done) as progress,
        closing(read_ahead(read_pieces(dataset, left, config.side, progress))) as reading,
    ):
        for read in reading:
            work.append(REJECTED, {"piece": read.piece.name, "rejected": read.rejected})
            work.save(read.piece.name, {"pixels": read.pixels, "labels": read.labels})
            rejected |= read.rejected
            if read.rejected and len(rejected) > config.max_bad_fraction * total and not warned:
                log.info("too many files cannot be used already (%d); reading on to list them all", len(rejected))
                warned = True
    return rejected


def _refuse_blank(folder: Path) -> None:
    """Raise `DiffstillError` where all training images are of one colour; usually the first rows tell that they are not."""
    pixels = Rows(folder, "train", "pixels")
    colour = pixels[:1].flat[0]
    if all((pixels[start : start + 256] == colour).all() for start in range(0, len(pixels), 256)):
        raise DiffstillError(
            f"every pixel of every training image is {colour}: there is nothing to learn; look at the files in `prepare.location`, and at their format"
        )


def _described(name: str, label: int) -> dict[str, Any]:
    """A line of the class map; ImageNet's classes, whose names are wnids, have a title in words."""
    title = title_of(name)
    return {"name": name, "label": label} | ({"title": title} if title else {})


def _facts(dataset: Dataset, rejected: dict[int, str], config: PrepareConfig) -> dict[str, Any]:
    return {
        "source": config.source,
        "classes": list(dataset.classes),
        "side": config.side,
        "channels": dataset.channels,
        "flip": config.flip,
        "counts": dataset.counts(rejected),
        "split": dataset.division,
        "rejected": len(rejected),
        "left_out": len(dataset.left_out),
        **({"leakage": dataset.leakage} if dataset.leakage else {}),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")

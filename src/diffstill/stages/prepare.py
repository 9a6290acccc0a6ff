"""prepare: real images, validated, cropped, split and cut into shards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from diffstill.artifacts import new_artifact, write_shards
from diffstill.config import PrepareConfig
from diffstill.datasets import Dataset, load
from diffstill.record import Record, ignore


def prepare(config: PrepareConfig, *, images: Path, data: Path | None = None, record: Record = ignore) -> dict[str, float]:
    """Write the `images` artifact: shards of train, val and test, the class map and the list of rejected files.

    The data lie in `data` where that is given, else where `config.location` says. Returns the number of images per
    split and of rejected files. Raises `DiffstillError` on data that break a rule;
    an earlier artifact at `images` is left as it was then.
    """
    with new_artifact(images, "images", config, {}) as draft:
        dataset = load(config.model_copy(update={"location": str(data)}) if data else config, record)
        for name, split in dataset.splits.items():
            write_shards(draft.folder, name, {"pixels": split.pixels, "labels": split.labels}, config.shard_size)
        _write_json(draft.folder / "classes.json", [{"name": name, "label": label} for label, name in enumerate(dataset.classes)])
        _write_json(draft.folder / "rejected.json", [dataclasses.asdict(rejected) for rejected in dataset.rejected])
        draft.facts.update(_facts(dataset, config))
    return {f"{name}_images": float(len(split.labels)) for name, split in dataset.splits.items()} | {"rejected": float(len(dataset.rejected))}


def _facts(dataset: Dataset, config: PrepareConfig) -> dict[str, Any]:
    return {
        "source": config.source,
        "classes": list(dataset.classes),
        "side": config.side,
        "channels": dataset.channels,
        "flip": config.flip,
        "counts": dataset.counts(),
        "split": dataset.division,
        "rejected": len(dataset.rejected),
        "ignored": dataset.ignored,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")

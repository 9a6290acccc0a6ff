"""Pin the base image: ask the registry for the digest of its tag, and write `base.lock`, on which `make images` builds."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import click
from push import docker, replace

from diffstill.cli import Refusal

LOCK = Path(__file__).with_name("base.lock")
RECIPE = Path(__file__).with_name("Dockerfile")


@click.command()
@click.option("--lock", type=click.Path(path_type=Path, dir_okay=False), default=LOCK, help="File to write; default: beside this script.")
def main(lock: Path) -> None:
    """Pull the base image that the Dockerfile names, and write it down with its digest; commit the file."""
    name = re.findall(r"^ARG BASE_IMAGE=(\S+)$", RECIPE.read_text(encoding="utf-8"), re.MULTILINE)[0]
    docker("pull", "--quiet", name, fix="is its registry reachable? without it no digest can be known")
    digests = json.loads(docker("image", "inspect", "--format", "{{json .RepoDigests}}", name, fix="pull it to see its digest"))
    if not digests:
        raise Refusal(f"{name} has no digest, as an image has that no registry gave; remove it (docker image rm {name}) and try again")
    replace(lock, f"{name}@{digests[0].rpartition('@')[2]}\n")
    click.echo(f"{lock}: {lock.read_text(encoding='utf-8').strip()}")


if __name__ == "__main__":
    sys.exit(main())

"""Push built images and write `images.lock`: which bytes a pipeline runs, by digest."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click

from diffstill.commands import Command, Refusal

LOCK = Path(__file__).with_name("images.lock")
DOCKER = os.environ.get("DOCKER", "docker")
REPOSITORY = re.compile(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+")
LABEL = "org.opencontainers.image."
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@click.command(cls=Command)
@click.option("--registry", default="", help="Registry and name to push to: host/name.")
@click.option("--lock", type=click.Path(path_type=Path, dir_okay=False), default=LOCK, help="File to write; default: beside this script.")
@click.option("--allow-unpinned-base", is_flag=True, help="Push images whose base image has no digest, so that nobody can build them again.")
@click.argument("targets", nargs=-1, required=True)
def main(registry: str, lock: Path, allow_unpinned_base: bool, targets: tuple[str, ...]) -> None:
    """Push the images diffstill:TARGET and write their digests; the lock holds these targets and no others, since it stands for one push."""
    if not REPOSITORY.fullmatch(registry):
        raise Refusal(f"REGISTRY is {registry!r}; it must be host/name, lower case: say make images-push REGISTRY=registry.example.org/diffstill")
    for target in targets:
        base = label(f"diffstill:{target}", "base.digest")
        if not allow_unpinned_base and not DIGEST.fullmatch(base):
            raise Refusal(
                f"diffstill:{target} was built on a base image without a digest ({base or 'none'}), so that nobody can build it again; "
                "pin it and build anew: make images-base images (or push with --allow-unpinned-base)"
            )
    references = {target: push(f"diffstill:{target}", registry) for target in targets}
    replace(lock, json.dumps(references, indent=2) + "\n")
    click.echo(f"wrote {lock}", err=True)
    for target, reference in references.items():
        click.echo(f"{target}  {reference}")


def push(image: str, repository: str) -> str:
    """Push under a tag of its own, which keeps the digest alive in the registry; `repository@digest`, as the registry answered it."""
    revision = label(image, "revision")
    name = f"{repository}:{image.partition(':')[2]}-{revision[:12] + '-dirty' * revision.endswith('-dirty')}"
    docker("tag", image, name, fix="is the name valid?")
    docker("push", "--quiet", name, fix=f"is {repository} reachable, and are you logged in (docker login)?")
    digests = json.loads(docker("image", "inspect", "--format", "{{json .RepoDigests}}", name, fix="pull it to see its digest"))
    return next(str(digest) for digest in digests if digest.startswith(f"{repository}@"))


def label(image: str, name: str) -> str:
    """One of the labels of the OCI; empty where it is missing."""
    return docker("image", "inspect", "--format", f'{{{{index .Config.Labels "{LABEL}{name}"}}}}', image, fix="build it first: make images")


def docker(*arguments: str, fix: str) -> str:
    """What Docker prints; refused with its own last line and the fix."""
    done = subprocess.run([DOCKER, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refusal(f"docker {' '.join(arguments[:2])} {arguments[-1]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}; {fix}")
    return done.stdout.strip()


def replace(path: Path, text: str) -> None:
    """The old file or the new one, never a part."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    sys.exit(main())

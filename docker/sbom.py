"""Write a software bill of materials (CycloneDX 1.6) of built images: every package of Python and of Debian, as the image itself lists them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from push import docker, replace

OF_PYTHON = """\
import json
from importlib.metadata import distributions
for one in distributions():
    print(json.dumps([one.metadata["Name"], one.version, one.metadata["License-Expression"]]))
"""
OF_DEBIAN = ("dpkg-query", "--show", "--showformat", "${Package}\\t${Version}\\t${Architecture}\\t${db:Status-Status}\\n")


@click.command()
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("build/sbom"), show_default=True)
@click.argument("targets", nargs=-1, required=True)
def main(output: Path, targets: tuple[str, ...]) -> None:
    """Write OUTPUT/TARGET.cdx.json for each image diffstill:TARGET."""
    output.mkdir(parents=True, exist_ok=True)
    for target in targets:
        found = [*of_python(inside(target, "python", "-c", OF_PYTHON)), *of_debian(inside(target, *OF_DEBIAN))]
        path = output / f"{target}.cdx.json"
        replace(path, bill(target, found))
        click.echo(f"{path}: {len(found)} packages")


def inside(target: str, *command: str) -> list[str]:
    """The lines that a command prints in the image."""
    said = docker("run", "--rm", "--network=none", f"diffstill:{target}", *command, fix="build it first: make images")
    return said.splitlines()


def of_python(lines: Iterable[str]) -> Iterator[Component]:
    """Packages of the environment."""
    for name, version, terms in sorted({tuple(json.loads(line)) for line in lines}, key=str):
        licenses = [LicenseFactory().make_from_string(terms)] if terms else None
        yield component(PackageURL("pypi", name=name, version=version), licenses=licenses)


def of_debian(lines: Iterable[str]) -> Iterator[Component]:
    """Packages of the system, without those of which nothing but configuration is left."""
    for name, version, architecture, state in (line.split("\t") for line in sorted(lines)):
        if state == "installed":
            yield component(PackageURL("deb", "debian", name, version, {"arch": architecture}))


def component(purl: PackageURL, **more: object) -> Component:
    """A package, known by its URL."""
    return Component(name=purl.name, version=purl.version, purl=purl, bom_ref=purl.to_string(), **more)


def bill(target: str, found: list[Component]) -> str:
    """The document, which names the image by its id and carries its labels' version."""
    facts = json.loads(docker("image", "inspect", f"diffstill:{target}", fix="build it first: make images"))[0]
    version = (facts["Config"]["Labels"] or {}).get("org.opencontainers.image.version")
    ref = f"image@{facts['Id']}"
    image = Component(name=f"diffstill:{target}", type=ComponentType.CONTAINER, version=version, bom_ref=ref)
    bom = Bom(components=found)
    bom.metadata.component = image
    bom.register_dependency(image, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())

"""The compiled pipeline: one file that is uploaded, or manifests that a cluster is given."""

import os
from pathlib import Path

from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from components.images import Images
from diffstill.artifacts import file_digest
from pipelines.distill import build
from pipelines.settings import Settings


def write_package(settings: Settings, images: Images, path: Path, *, kubernetes: bool = False, caching: bool = True) -> None:
    """Write the intermediate representation, or with `kubernetes` the manifests of a Pipeline and its version; whole or not at all.

    A version is named by its content, because what it holds cannot be changed. Images by tag are never cached: the cache of a cluster cannot tell when a tag has moved. Equal settings, images and code give equal bytes for one version of kfp.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.stem}.yaml")
    pipeline = build(settings.infra, images, caching=caching and images.by_digest)
    try:
        compiler.Compiler().compile(pipeline, str(partial))
        if kubernetes:
            name = settings.cluster.pipeline
            version = f"{name}-{file_digest(partial)[:16]}"
            options = KubernetesManifestOptions(
                pipeline_name=name,
                pipeline_version_name=version,
                pipeline_version_display_name=version,
                namespace=settings.cluster.namespace,
                include_pipeline_manifest=True,
            )
            compiler.Compiler().compile(pipeline, str(partial), kubernetes_manifest_format=True, kubernetes_manifest_options=options)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

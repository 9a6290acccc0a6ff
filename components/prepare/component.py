"""The stage `prepare` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).cpu, install_kfp_package=False)
def prepare(
    config: str,
    images: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    data_version: str = "",
) -> None:
    """Read, check, crop and split the real images.

    Args:
        config: Section `prepare` of params.yaml, as JSON.
        images: Real images: shards of train, val and test.
        metrics: What the stage measured.
        data_version: What tells the data from other data at the same location, so that the cache does not take one for the other; empty = the location does.

    """
    from diffstill.task import run_task

    run_task("prepare", config, images=images, metrics=metrics, data_version=data_version)

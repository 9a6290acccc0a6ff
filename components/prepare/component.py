"""The stage `prepare` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).cpu, install_kfp_package=False)
def prepare(
    config: str,
    images: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    """Read, check, crop and split the real images.

    Args:
        config: Section `prepare` of params.yaml, as JSON.
        images: Real images: shards of train, val and test.
        metrics: What the stage measured.

    """
    from diffstill.task import run_task

    run_task("prepare", config, images=images, metrics=metrics)

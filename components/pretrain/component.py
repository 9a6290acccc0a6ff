"""The stage `pretrain` as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).gpu, install_kfp_package=False)
def pretrain(
    config: str,
    images: dsl.Input[dsl.Dataset],
    generator: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    weights: dsl.Input[dsl.Model] = None,
) -> None:
    """Train a small generator on the training split, or take over a DiTPipeline folder.

    Args:
        config: Section `pretrain` of params.yaml, as JSON.
        images: Real images, from prepare.
        generator: Autoencoder and transformer, as diffusers opens them.
        metrics: What the stage measured.
        weights: A diffusers DiTPipeline folder, in place of `pretrain.location`.

    """
    from diffstill.task import run_task

    run_task("pretrain", config, images=images, generator=generator, metrics=metrics, weights=weights)

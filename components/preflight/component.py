"""The check before a run as a component of Kubeflow Pipelines."""

from kfp import dsl

from components.images import load_images


@dsl.component(base_image=load_images(allow_tag=True).cpu, install_kfp_package=False)
def preflight(needs: str, params: str) -> None:
    """Check bucket, MLflow, secrets, GPU, disk and shared memory before GPU time is spent.

    Args:
        needs: What the run needs, as JSON.
        params: The whole of params.yaml as JSON; they are logged with the run in MLflow.

    """
    from diffstill.task import run_preflight

    run_preflight(needs, params)

"""The stages as components of Kubeflow Pipelines: a signature that the UI shows, and a body of one import and one call."""

"""The pipeline on Kubeflow: what it is made of, what it runs on, and how it is compiled, run here and submitted."""

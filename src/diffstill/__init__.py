"""diffstill: dataset distillation by diffusion with a self-adaptive memory."""

__version__ = "0.1.0"

"""The README of each component, written from its signature: `python -m pipelines readme`; a test holds them to it."""

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipelines.placement import retries
from pipelines.settings import InfraConfig, Resources

COMPONENTS = Path(__file__).parents[1] / "components"
TEMPLATE = """\
# {{ name }}

{{ purpose }}

<!-- Written by `python -m pipelines readme`; change the docstring in component.py or pipelines/settings.yaml instead. -->

## Inputs
{% for item in inputs %}
- `{{ item.name }}` ({{ item.type }}{{ ", optional" if item.optional }}): {{ item.text }}
{%- endfor %}

## Outputs
{% for item in outputs %}
- `{{ item.name }}` ({{ item.type }}): {{ item.text }}
{%- else %}
- none: it fails or lets the run go on
{%- endfor %}

## Resources

As `pipelines/settings.yaml` has them: {{ resources }}.{% if retries %} A failed attempt is tried again, up to {{ retries }} times, on a cluster with
`infra/kubernetes/components/kubeflow-retries`.{% endif %}

## Run it alone

```
{{ command }}
```
"""


def readmes(infra: InfraConfig) -> dict[Path, str]:
    """Path -> text of every component's README."""
    names = sorted(path.parent.name for path in COMPONENTS.glob("*/component.py"))
    return {COMPONENTS / name / "README.md": _readme(name, infra) for name in names}


def _readme(name: str, infra: InfraConfig) -> str:
    component = getattr(importlib.import_module(f"components.{name}.component"), name)
    resources = infra.resources["finetune" if name == "preflight" else name]
    spec, texts = component.component_spec, _argument_texts(component.python_func)
    template = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True).from_string(TEMPLATE)  # noqa: S701  (Markdown, our own words)
    return template.render(
        name=name,
        purpose=str(inspect.getdoc(component.python_func)).split("\n\n")[0],
        inputs=[_item(item, spec.inputs[item], texts) for item in sorted(spec.inputs or {}, key=list(texts).index)],
        outputs=[_item(item, spec.outputs[item], texts) for item in sorted(spec.outputs or {}, key=list(texts).index)],
        resources=_resources(resources),
        retries=retries(name, resources),
        command=_command(name, resources),
    )


def _argument_texts(function: Any) -> dict[str, str]:
    lines = str(inspect.getdoc(function)).partition("Args:\n")[2].splitlines()
    return {name: text.strip() for name, _, text in (line.strip().partition(":") for line in lines)}


def _item(name: str, spec: Any, texts: Mapping[str, str]) -> dict[str, Any]:
    kind = str(spec.type).removeprefix("system.").partition("@")[0]
    kind = f"list of {kind}" if getattr(spec, "is_artifact_list", False) else kind
    return {"name": name, "type": kind, "text": texts[name], "optional": getattr(spec, "optional", False)}


def _resources(resources: Resources) -> str:
    given = {"GPUs": resources.gpus, "CPUs": resources.cpu, "memory": resources.memory, "shared memory": resources.shared_memory}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value)


def _command(name: str, resources: Resources) -> str:
    """The stage's own command, in its image; paths lie in the current folder."""
    from diffstill.plan import STAGES

    if name == "preflight":
        return "docker run --rm diffstill:cpu diffstill doctor --disk 1 --environment HOME"
    stage = STAGES[name]
    paths = [f"--{given} artifacts/{given}" for given in (*stage.inputs, *stage.optional, *stage.many, stage.output)]
    options = "--gpus all " * bool(resources.gpus) + "--env MLFLOW_TRACKING_URI " * stage.registers
    image = f"{options}diffstill:{'gpu' if resources.gpus else 'cpu'}"
    return f'docker run --rm --user "$(id -u)" --volume "$PWD:/data" --workdir /data {image} \\\n  diffstill {name} {" ".join(paths)}'

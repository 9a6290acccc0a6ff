"""One name everywhere: params section = module = function = subcommand = DVC stage; and DVC knows what each stage depends on."""

import inspect
import re
import shlex
import typing
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import grimp
import pytest
from ruamel.yaml import YAML

import diffstill
from diffstill.artifacts import Kind
from diffstill.cli import FLAGS, PATHS, SUMMARIES, main
from diffstill.config import PRESETS, EvaluateConfig, Params, preset
from diffstill.plan import STAGES, chain
from diffstill.record import Record, ignore
from diffstill.reproduce import reproduce
from diffstill.stages.publish import Registry

ROOT = Path(__file__).parents[1]
PACKAGE = Path(diffstill.__file__).parent
TRACKED_OTHERWISE = {"diffstill", "diffstill.stages", "diffstill.config", "diffstill.errors", "diffstill.record"}
"""No code dependencies in dvc.yaml: `config` is tracked value by value through params.yaml, and `errors` and `record` change no byte of an artifact."""
WITHOUT_TESTS = {"__init__", "__main__", "errors", "record"}
"""Too small to go wrong alone; every other test runs them."""


def function(stage):
    return getattr(__import__(f"diffstill.stages.{stage}", fromlist=[stage]), stage)


# --- names --------------------------------------------------------------------------------------------------------


def test_one_name_everywhere():
    modules = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    assert Params.STAGES == tuple(Params.model_fields) == tuple(STAGES) == tuple(SUMMARIES)
    assert set(STAGES) == modules
    assert set(STAGES) <= set(main.commands)
    inside = {name for name, stage in STAGES.items() if not stage.registers}
    assert inside == {re.split("[@-]", name)[0] for name in dvc()["stages"]} == {step.stage for step in chain(Params())}


def test_every_artifact_is_made_by_one_stage_and_explained():
    assert sorted(stage.output for stage in STAGES.values()) == sorted(typing.get_args(Kind))
    assert set(PATHS) == {name for stage in STAGES.values() for name in (stage.output, *stage.inputs, *stage.optional, *stage.many, *stage.outside)}


def test_every_module_has_a_test_file():
    modules = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    tested = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert {
        str(module) for module in modules if module.name not in WITHOUT_TESTS and module.with_name(f"test_{module.name}.py") not in tested
    } == set()


def test_the_readme_lists_every_module_and_no_other():
    tree = (ROOT / "README.md").read_text().partition("\nsrc/diffstill/\n")[2].partition("\ncomponents/ ")[0]
    dunders = {"__init__.py", "__main__.py"}
    assert set(re.findall(r"\w+\.py\b", tree)) == {path.name for path in PACKAGE.glob("*.py")} - dunders
    [told] = re.findall(r"^  stages/ +([a-z ]+):", tree, re.MULTILINE)
    assert set(told.split()) == {path.stem for path in (PACKAGE / "stages").glob("[a-z]*.py")}


# --- signatures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_signature(name):
    """The configuration first; then by name alone: inputs, options, the output, `record`, and `device` for stages that compute on one."""
    stage, parameters, hints = STAGES[name], inspect.signature(function(name)).parameters, typing.get_type_hints(function(name))
    assert next(iter(parameters)) == "config"
    assert {parameter.kind for given, parameter in parameters.items() if given != "config"} == {inspect.Parameter.KEYWORD_ONLY}
    expected = {
        "config": (type(Params().section(name)), inspect.Parameter.empty),
        stage.output: (Path, inspect.Parameter.empty),
        "record": (Record, ignore),
        **dict.fromkeys(stage.inputs, (Path, inspect.Parameter.empty)),
        **dict.fromkeys((*stage.optional, *stage.outside), (Path | None, None)),
        **dict.fromkeys(stage.many, (Sequence[Path], inspect.Parameter.empty)),
        **dict.fromkeys(stage.options, (str | None, None)),
        **({"parts": (Sequence[Path], ()), "shard": (str | None, None)} if stage.sharded else {}),
        **dict.fromkeys(stage.flags, (bool, False)),
        **({"registry": (Registry, inspect.Parameter.empty)} if stage.registers else {}),
        **({"device": (str, "cpu")} if stage.on_device else {}),
    }
    assert {given: (hints[given], parameter.default) for given, parameter in parameters.items()} == expected
    assert hints["return"] == dict[str, float]


@pytest.mark.parametrize("name", STAGES)
def test_the_subcommand_has_the_same_interface(name):
    stage, options = STAGES[name], {option.name: option for option in main.commands[name].params}
    paths = {stage.output, *stage.inputs, *stage.optional, *stage.many}
    more = (
        {*stage.options, *stage.flags, *stage.outside} | ({"device"} if stage.on_device else set()) | ({"shard", "parts"} if stage.sharded else set())
    )
    assert set(options) == paths | more | {"step", "params_path", "changes", "as_json"}
    required = set() if stage.registers else paths - set(stage.optional)
    assert {given for given, option in options.items() if option.required} == required
    assert set(stage.flags) <= set(FLAGS)


# --- dvc.yaml against the chain -----------------------------------------------------------------------------------


def dvc():
    return YAML(typ="safe").load(ROOT / "dvc.yaml")


def filled(value, item):
    if isinstance(value, str):
        return re.sub(r"\$\{item\.(\w+)\}", lambda match: item[match[1]], value)
    return [filled(part, item) for part in value] if isinstance(value, list) else value


def expanded(params):
    """The stages of dvc.yaml by name, each matrix written out as DVC does."""
    known, steps = {"${evaluate.students}": list(params.evaluate.students)}, {}
    for name, stage in dvc()["stages"].items():
        matrix = {axis: known[values] if isinstance(values, str) else values for axis, values in stage.pop("matrix", {}).items()}
        for cell in product(*matrix.values()):
            item = dict(zip(matrix, cell, strict=True))
            suffix = f"@{'-'.join(cell)}" if cell else ""
            steps[name + suffix] = {key: filled(value, item) for key, value in stage.items()}
    return steps


def two_students():
    evaluate = EvaluateConfig(**(dict(preset("tiny").evaluate) | {"students": ("convnet-2", "resnet18.a1_in1k")}))
    return preset("tiny").model_copy(update={"evaluate": evaluate})


EXPERIMENTS = {**{name: preset(name) for name in PRESETS}, "two students": two_students()}
STEPS = [pytest.param(params, step, id=f"{name}: {step.name}") for name, params in EXPERIMENTS.items() for step in chain(params)]


def test_what_lies_outside_can_be_named_when_a_set_is_made_anew():
    places = {option for stage in STAGES.values() for option in stage.outside}
    assert places == set(inspect.signature(reproduce).parameters) - {"found", "folder", "device"}


@pytest.mark.parametrize("params", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_dvc_has_the_steps_of_the_chain(params):
    assert list(expanded(params)) == [step.name for step in chain(params)]


@pytest.mark.parametrize(("params", "step"), STEPS)
def test_a_dvc_stage_does_what_the_step_does(params, step):
    stage, written = STAGES[step.stage], expanded(params)[step.name]
    program, command, *arguments = shlex.split(written["cmd"])
    assert (program, command) == ("diffstill", step.stage)

    given = main.commands[command].make_context(command, arguments).params
    assert not given.get("parts")
    folders = {name: Path("artifacts") / where if isinstance(where, str) else Path("artifacts") / name for name, where in step.paths.items()}
    assert {name: value for name, value in given.items() if isinstance(value, Path) and name != "params_path"} == folders
    assert given["step"] == step.name
    assert given.get("student") == step.student

    assert written["outs"] == [folders[stage.output].as_posix()]
    assert {dep for dep in written["deps"] if dep.startswith("artifacts/")} == {
        folder.as_posix() for name, folder in folders.items() if name != stage.output
    }
    assert written["params"][0] == step.stage
    assert set(written) == {"cmd", "deps", "params", "outs"}


def test_the_report_depends_on_the_students_too():
    assert dvc()["stages"]["report"]["params"] == ["report", "evaluate.students"]


@pytest.mark.parametrize("params", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_the_chain_runs_in_order_and_no_two_steps_write_one_folder(params):
    made = []
    for step in chain(params):
        own = step.paths[STAGES[step.stage].output]
        needed = [where for name, where in step.paths.items() if name != STAGES[step.stage].output]
        assert {where for one in needed for where in ((one,) if isinstance(one, str) else one)} <= set(made)
        assert own not in made
        made.append(own)


def test_plots_and_metrics_lie_in_outputs():
    outputs = tuple(f"{out}/" for stage in expanded(preset("digits")).values() for out in stage["outs"])
    drawn = [path for plot in dvc()["plots"] for spec in plot.values() for path in spec["y"]]
    assert all(path.startswith(outputs) for path in [*dvc()["metrics"], *drawn])


# --- code that a stage depends on ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imports():
    return grimp.build_graph("diffstill", cache_dir=None)


def reached(imports, module):
    """Every module of ours that `module` imports, however far away, but not through those tracked otherwise."""
    found, frontier = {module}, {module}
    while frontier:
        frontier = {target for one in frontier for target in imports.find_modules_directly_imported_by(one)} - found - TRACKED_OTHERWISE
        found |= frontier
    return found


@pytest.mark.parametrize("name", dvc()["stages"])
def test_dvc_knows_the_code_of_each_stage(name, imports):
    """Exactly the modules that can change its bytes: one more would re-run it in vain, one less would leave it stale."""
    module = f"diffstill.stages.{re.split('[@-]', name)[0]}"
    needed = {f"src/{one.replace('.', '/')}.py" for one in reached(imports, module)}
    read = {"html": "templates/report.html.j2", "imagenet": "imagenet_classes.csv"}
    needed |= {f"src/diffstill/{data}" for reader, data in read.items() if f"src/diffstill/{reader}.py" in needed}
    written = {dep for dep in dvc()["stages"][name]["deps"] if dep.startswith("src/")}
    assert written == needed
    assert all((ROOT / dep).exists() for dep in written)


def test_of_what_a_chain_runs_only_these_read_files_of_the_package():
    readers = {path.stem for path in PACKAGE.rglob("*.py") if re.search("PackageLoader|importlib.resources", path.read_text())}
    assert readers == {"html", "imagenet", "publish", "compare"}

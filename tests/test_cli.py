"""The command line: what it offers, and that bad input ends in one message, exit code 2 and untouched artifacts."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner
from PIL import Image
from ruamel.yaml import YAML

import diffstill
from chains import contents
from diffstill.cli import main
from diffstill.config import PRESETS, Params, json_schema, load_params, preset, render_params
from diffstill.plan import STAGES

IMAGES, GENERATOR, DISTILLED = ("--images", "artifacts/images"), ("--generator", "artifacts/generator"), ("--distilled", "artifacts/distilled")
REAL = ("--scores", "artifacts/scores/real-convnet-2")


def call(*arguments, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="diffstill", **options)


def console(*arguments, cwd, **environment):
    script = Path(sys.executable).with_name("diffstill")
    return subprocess.run([script, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def project(here, tiny_chain):
    """A folder with params.yaml and a finished chain."""
    shutil.copytree(tiny_chain.artifacts, here / "artifacts")
    (here / "params.yaml").write_text(render_params(tiny_chain.params))
    return here


def knobs(project, **sections):
    """Change values in params.yaml, known or not."""
    path = project / "params.yaml"
    values = YAML(typ="safe").load(path)
    for section, changes in sections.items():
        values[section] |= changes
    path.write_text(json.dumps(values))


def pictures(root, **counts):
    """A folder of classes with plain images."""
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            path = root / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number * 90 + i).save(path)
    return root


def folder_of(project, **counts):
    (project / "data" / "train").mkdir(parents=True)
    pictures(project / "data", **counts)
    knobs(project, prepare={"source": "folder", "location": "data", "classes": None}, publish={"name": "mine"})


# --- refused ------------------------------------------------------------------------------------------------------


def with_one_image(project):
    folder_of(project, a=20, b=1)


def with_one_class(project):
    folder_of(project, a=20)


def with_nothing(project):
    folder_of(project)


def with_truncated_jpeg(project):
    folder_of(project, a=20, b=20)
    path = project / "data" / "train" / "a" / "photo.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:-600])


def with_text_as_png(project):
    folder_of(project, a=20, b=20)
    (project / "data" / "train" / "b" / "notes.png").write_text("dear diary")


def without_denoiser(project):
    shutil.rmtree(project / "artifacts" / "denoiser")


def with_a_flipped_bit(project):
    path = project / "artifacts" / "images" / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def setting(**sections):
    return lambda project: knobs(project, **sections)


def nothing(_project):
    pass


PREPARE, REAL_STUDENTS, SAMPLE = ("prepare", *IMAGES), ("evaluate", *IMAGES, *REAL), ("sample", *GENERATOR, *DISTILLED)
REFUSED = {
    "unknown knob": (setting(sample={"guidanse": 2}), SAMPLE, "params.yaml: `sample.guidanse` is not a knob"),
    "wrong type": (setting(sample={"steps": "many"}), SAMPLE, "params.yaml: `sample.steps` is 'many': Input should be a valid integer"),
    "no params": (lambda project: (project / "params.yaml").unlink(), SAMPLE, "params.yaml: no such file; write one with `diffstill preset digits`"),
    "IPC above a class": (
        setting(evaluate={"images_per_class": [1, 400]}, sample={"images_per_class": 400}),
        REAL_STUDENTS,
        "`evaluate.images_per_class` asks for 400, but no class of digits has more than 131 training images; lower it",
    ),
    "one class of digits": (
        setting(prepare={"classes": ["7"]}),
        PREPARE,
        "only the class '7' to work with, but telling classes apart takes at least two",
    ),
    "one class in a folder": (with_one_class, PREPARE, "only the class 'a' to work with"),
    "class with one image": (with_one_image, PREPARE, "class 'b' has 1 "),
    "empty folder": (with_nothing, PREPARE, "has no class to work with"),
    "absent folder": (
        setting(prepare={"source": "folder", "location": "nowhere"}, publish={"name": "mine"}),
        PREPARE,
        "nowhere: is no folder, but `prepare.location` names it",
    ),
    "truncated JPEG": (with_truncated_jpeg, PREPARE, "1 of 41 image files cannot be used, above `prepare.max_bad_fraction` 0 (train/a/photo.jpg: "),
    "text as PNG": (with_text_as_png, PREPARE, "(train/b/notes.png: not a readable image"),
    "unknown student": (setting(evaluate={"students": ["convnext-2000"]}), REAL_STUDENTS, "student 'convnext-2000' is not known; did you mean "),
    "student too deep": (
        setting(evaluate={"students": ["convnet-4"]}),
        REAL_STUDENTS,
        "student 'convnet-4' needs images of at least 16 px, these have 8 px",
    ),
    "student not chosen": (nothing, (*REAL_STUDENTS, "--student", "convnet-1"), "student 'convnet-1' is not among `evaluate.students`"),
    "missing input": (
        without_denoiser,
        (*SAMPLE, "--denoiser", "artifacts/denoiser"),
        "artifacts/denoiser: no artifact here; run the stage that makes it first",
    ),
    "wrong kind of input": (
        nothing,
        ("sample", "--generator", "artifacts/latents", *DISTILLED),
        "artifacts/latents: holds a `latents` artifact where `generator` is expected",
    ),
    "wrong kind of output": (
        nothing,
        ("sample", *GENERATOR, "--distilled", "artifacts/latents"),
        "artifacts/latents: holds a `latents` artifact; refusing to replace it",
    ),
    "output that is no artifact": (nothing, ("prepare", "--images", "artifacts"), "artifacts: exists and is not an artifact; refusing to replace it"),
    "flipped bit": (
        with_a_flipped_bit,
        ("pretrain", *IMAGES, *GENERATOR),
        "train-00000.safetensors: content differs from the digest in its manifest",
    ),
    "missing scores": (
        setting(evaluate={"students": ["convnet-2", "convnet-1"]}),
        (
            "report",
            *IMAGES,
            "--denoiser",
            "artifacts/denoiser",
            *DISTILLED,
            *["--untuned", "artifacts/untuned", "--scores", "artifacts/scores"],
            "--report",
            "new",
        ),
        "artifacts/scores/distilled-convnet-1: no artifact here",
    ),
    "unknown device": (nothing, (*SAMPLE, "--device", "abacus"), "--device 'abacus' is not a device; use cpu, cuda, cuda:<n> or auto"),
    "absent device": (nothing, (*SAMPLE, "--device", "cuda:99"), "--device 'cuda:99' is not here"),
    "device of another make": (nothing, (*SAMPLE, "--device", "meta"), "--device 'meta' is not here"),
    "summary of nothing": (nothing, ("summary", "--artifacts", "nowhere"), "nowhere/report: does not exist"),
    "changed knob that is none": (nothing, ("run", "--set", "sample.guidanse=3"), "`sample.guidanse` is not a knob; did you mean `sample.guidance`?"),
    "changed knob of the wrong type": (
        nothing,
        ("run", "--set", "sample.guidance=high"),
        "--set: `sample.guidance` is 'high': Input should be a valid number",
    ),
    "change without a section": (nothing, ("run", "--set", "guidance=3"), "--set 'guidance=3': write <section>.<knob>=<value>"),
    "change without a value": (nothing, (*SAMPLE, "--set", "sample.guidance"), "--set 'sample.guidance': write <section>.<knob>=<value>"),
    "change of a group": (
        nothing,
        ("plan", "--set", "pretrain.vae={steps: 3}"),
        "`pretrain.vae` is a group of knobs; set them one at a time, like pretrain.vae.",
    ),
    "change that is no YAML": (nothing, ("show", "--set", "finetune.seeds=[0, 1"), "--set 'finetune.seeds=[0, 1': not valid YAML"),
    "change to a date": (nothing, ("run", "--set", "publish.note=2026-11-26"), "--set: holds a value that is no number, text, list or mapping"),
    "change that does not fit the rest": (nothing, ("run", "--set", "sample.images_per_class=1"), "--set: `evaluate.images_per_class` asks for 2"),
    "open of nothing": (nothing, ("open", "--artifacts", "nowhere"), "nowhere/report: does not exist"),
    "run with a bad knob": (setting(report={"shown": 3}), ("run",), "`report.shown` is not a knob"),
}


@pytest.mark.parametrize(("spoil", "command", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_ends_in_one_message_and_touches_nothing(spoil, command, message, project):
    spoil(project)
    before = contents(project / "artifacts")
    result = call("-q", *command)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert contents(project / "artifacts") == before
    assert not [path for path in (project / "artifacts").rglob("*") if path.name.startswith(".")], "litter"


def test_the_console_script_refuses_in_the_same_way(project):
    """With progress messages on; the error is the last line."""
    with_text_as_png(project)
    before = contents(project / "artifacts")
    done = console(*PREPARE, cwd=project)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert "notes.png" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert contents(project / "artifacts") == before


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "error: out/shard: No space left on device; free some space or choose another disk"),
        (errno.EACCES, "error: out/shard: Permission denied; mend the permissions or choose another folder"),
        (errno.EROFS, "error: out/shard: Read-only file system; mend the permissions or choose another folder"),
    ],
)
def test_what_the_disk_refuses_is_the_users_to_mend(code, message, monkeypatch):
    def fail(*_given, **_options):
        raise OSError(code, os.strerror(code), "out/shard")

    monkeypatch.setattr("diffstill.cli.load_params", fail)
    result = call("show")
    assert (result.exit_code, result.stderr) == (2, message + "\n")


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("diffstill.cli.load_params", lambda *_given: {}["gone"])
    assert isinstance(call("show").exception, KeyError)


def test_a_file_where_a_folder_is_expected_is_refused(here):
    (here / "params.yaml").write_text(render_params(preset("tiny")))
    (here / "out").write_text("")
    result = call("prepare", "--images", "out/images")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: out: ")
    assert call("prepare", "--images", "out").exit_code == 2


# --- stages and the chain -----------------------------------------------------------------------------------------


def test_a_stage_by_hand_gives_the_bytes_of_the_chain(project):
    before = contents(project / "artifacts")
    report = ("report", *IMAGES, "--denoiser", "artifacts/denoiser", *DISTILLED, "--untuned", "artifacts/untuned", "--report", "artifacts/report")
    for command in (PREPARE, (*SAMPLE, "--denoiser", "artifacts/denoiser"), (*report, "--scores", "artifacts/scores")):
        result = call(*command)
        assert result.exit_code == 0, result.output
        assert f"{command[0]} done in " in result.stderr
    assert contents(project / "artifacts") == before


@pytest.mark.usefixtures("project")
def test_run_leaves_a_finished_chain_alone_and_shows_its_table():
    result = call("run")
    assert result.exit_code == 0
    assert result.stderr.count(" is up to date\n") == 10
    assert result.stdout == call("summary").stdout
    assert call("-q", "run").stderr == ""


def test_scores_may_lie_anywhere(project, monkeypatch):
    """Also in the current folder."""
    monkeypatch.chdir(project / "artifacts" / "scores")
    given = [part for name in ("images", "denoiser", "distilled", "untuned") for part in (f"--{name}", f"../{name}")]
    result = call("report", *given, "--scores", ".", "--report", "../again", "--params", "../../params.yaml")
    assert result.exit_code == 0, result.output
    assert contents(project / "artifacts" / "again") == contents(project / "artifacts" / "report")


# --- help ---------------------------------------------------------------------------------------------------------


def described(section, prefix=""):
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if hasattr(value, "model_fields_set"):
            yield from described(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, field.description


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_every_knob_of_the_section_and_every_option(stage):
    result = call(stage, "--help")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.stdout.splitlines()]
    for name, value, text in described(Params().section(stage)):
        line = lines.index(f"{name} = {json.dumps(value)}")
        assert lines[line + 1] == text
    for option in main.commands[stage].params:
        assert option.help
        assert option.opts[0] in result.stdout


def test_help_lists_every_command():
    stdout = call("-h").stdout
    for name, command in main.commands.items():
        assert f"  {name} " in stdout
        assert command.get_short_help_str()
    versions = {"list", "search", "card", "download", "export", "lineage", "compare", "reproduce", "promote", "deprecate", "gc"}
    assert set(main.commands) == {
        *STAGES,
        *versions,
        "run",
        "plan",
        "open",
        "ui",
        "merge",
        "summary",
        "show",
        "schema",
        "preset",
        "doctor",
        "completion",
    }


def test_version():
    assert call("--version").stdout == f"diffstill, version {diffstill.__version__}\n"


def test_module_and_script_are_one(here):
    done = console("--version", cwd=here)
    assert (done.returncode, done.stdout) == (0, f"diffstill, version {diffstill.__version__}\n")


def test_light_commands_do_not_load_torch(here):
    """So that help and completion answer at once."""
    code = "import sys; from diffstill.cli import main; main(['schema'], standalone_mode=False); sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    result = call("completion", shell)
    assert result.exit_code == 0
    assert f"_DIFFSTILL_COMPLETE={shell}_complete" in result.stdout


def test_completion_completes(here):
    done = console(cwd=here, _DIFFSTILL_COMPLETE="bash_complete", COMP_WORDS="diffstill pre", COMP_CWORD="1")
    assert done.stdout.split() == ["plain,prepare", "plain,preset", "plain,pretrain"]


# --- params.yaml --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_preset_writes_parameters(name, here):
    result = call("preset", name)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"wrote params.yaml (preset {name}); next: diffstill run\n")
    assert load_params(here / "params.yaml") == preset(name)


def test_an_untouched_preset_is_replaced_by_another(here):
    assert call("preset", "digits").exit_code == call("preset", "tiny").exit_code == call("preset", "tiny").exit_code == 0
    assert load_params(here / "params.yaml") == preset("tiny")


def test_changed_values_are_overwritten_by_force_alone(here):
    mine = "# mine\nsample: {guidance: 2.5, steps: 7}\n"
    (here / "params.yaml").write_text(mine)
    result = call("preset", "digits")
    assert result.exit_code == 2
    assert result.stderr == "error: params.yaml: holds values of its own (sample.guidance = 2.5, sample.steps = 7); use --force to overwrite them\n"
    assert (here / "params.yaml").read_text() == mine
    assert call("preset", "digits", "--force").exit_code == 0
    assert load_params(here / "params.yaml") == preset("digits")


def test_a_file_that_is_no_parameters_is_overwritten_by_force_alone(here):
    (here / "thesis.txt").write_text("dear")
    result = call("preset", "tiny", "--output", "thesis.txt")
    assert (result.exit_code, result.stderr.splitlines()[0][:19]) == (2, "error: thesis.txt: ")
    assert (here / "thesis.txt").read_text() == "dear"
    assert call("preset", "tiny", "--output", "thesis.txt", "--force").exit_code == 0


@pytest.mark.usefixtures("here")
def test_preset_needs_a_folder_to_write_to():
    result = call("preset", "tiny", "--output", "nowhere/params.yaml")
    assert (result.exit_code, result.stderr) == (2, "error: nowhere: no such folder; make it, or choose another --output\n")


def test_show_prints_the_resolved_configuration(here):
    (here / "params.yaml").write_text("sample: {guidance: 2}\n")
    wanted = Params(sample=Params().sample.model_copy(update={"guidance": 2.0}))
    assert call("show").stdout == render_params(wanted)
    assert json.loads(call("show", "--json").stdout) == wanted.model_dump(mode="json")


def test_schema():
    assert json.loads(call("schema").stdout) == json.loads(json.dumps(json_schema()))


# --- shards, and what a run needs ---------------------------------------------------------------------------------


def test_shards_are_made_and_gathered_by_command(tiny_chain, here):
    (here / "params.yaml").write_text(render_params(tiny_chain.params))
    shutil.copytree(tiny_chain.artifacts, here / "artifacts")
    for index in range(2):
        assert call("encode", *IMAGES, *GENERATOR, "--latents", f"part-{index}", "--shard", f"{index}/2").exit_code == 0
    gathered = call("encode", *IMAGES, *GENERATOR, "--latents", "latents", "--parts", "part-1", "--parts", "part-0")
    assert gathered.exit_code == 0, gathered.output
    assert contents(here / "latents") == contents(tiny_chain.artifacts / "latents")
    lacking = call("encode", *IMAGES, *GENERATOR, "--latents", "latents", "--parts", "part-1", "--parts", "part-2")
    assert (lacking.exit_code, lacking.stderr.count("error: part-2: no artifact here")) == (2, 1)
    wrong = call("encode", *IMAGES, *GENERATOR, "--latents", "other", "--shard", "2/2")
    assert (wrong.exit_code, wrong.stderr.splitlines()[-1]) == (
        2,
        "error: shard '2/2' is not <index>/<count> with the index counted from 0; the first of three is 0/3",
    )


@pytest.mark.usefixtures("here")
def test_doctor_names_what_a_run_would_lack(monkeypatch):
    monkeypatch.setenv("PRESENT", "sentinel")
    fine = call("doctor", "--environment", "PRESENT", "--disk", "0.001")
    assert fine.exit_code == 0, fine.output
    lacking = call("doctor", "--environment", "PRESENT", "--environment", "ABSENT", "--shared-memory", "1e6")
    assert lacking.exit_code == 2
    assert "error: this machine lacks what the run needs: (1)" in lacking.stderr
    assert "ABSENT" in lacking.stderr
    assert "sentinel" not in fine.output + lacking.output


# --- one knob otherwise, and what would run -----------------------------------------------------------------------


def runs(*arguments) -> dict[str, str | None]:
    """Why each step would run."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    steps = json.loads(result.stdout)
    assert all(step["runs"] == (step["why"] is not None) for step in steps)
    return {step["step"]: step["why"] for step in steps}


def test_a_change_is_typed_and_the_last_one_holds(project):
    changes = ("--set", "sample.guidance=9", "--set", "sample.guidance=2", "--set", "prepare.classes=['1', '2']", "--set", "pretrain.vae.steps=7")
    shown = json.loads(call("show", "--json", *changes).stdout)
    assert (shown["sample"]["guidance"], shown["prepare"]["classes"], shown["pretrain"]["vae"]["steps"]) == (2.0, ["1", "2"], 7)
    assert (project / "params.yaml").read_text() == render_params(preset("tiny")), "the file stays as it was"


def test_a_plan_says_what_would_run_and_why_and_the_run_does_that(project):
    assert set(runs("plan").values()) == {None}
    change = ("--set", "sample.guidance=1.75")
    plan = runs("plan", *change)
    assert {name for name, why in plan.items() if why} == {
        "sample",
        "sample-untuned",
        "evaluate@distilled-convnet-2",
        "evaluate@untuned-convnet-2",
        "report",
    }
    assert plan["sample"] == plan["sample-untuned"] == "sample.guidance 1.5 -> 1.75"
    assert plan["evaluate@distilled-convnet-2"] == "after sample"
    assert plan["report"] == "after sample, sample-untuned, evaluate@distilled-convnet-2 and 1 more"
    before = contents(project / "artifacts")
    assert runs("run", "--dry-run", *change) == plan
    assert contents(project / "artifacts") == before
    result = call("run", *change)
    assert result.exit_code == 0, result.output
    assert "5 of 10 steps to run" in result.stderr
    assert set(runs("plan", *change).values()) == {None}
    assert json.loads((project / "artifacts" / "distilled" / "manifest.json").read_text())["config"]["guidance"] == 1.75
    assert runs("plan")["sample"] == "sample.guidance 1.75 -> 1.5"


def test_a_plan_tells_an_input_that_was_changed(project):
    shutil.rmtree(project / "artifacts" / "images")
    assert call("prepare", "--images", "artifacts/images", "--set", "prepare.val_fraction=0.3").exit_code == 0
    plan = runs("plan", "--set", "prepare.val_fraction=0.3")
    assert (plan["prepare"], plan["pretrain"], plan["finetune"]) == (None, "input images changed", "after encode, pretrain")
    assert runs("plan")["prepare"] == "prepare.val_fraction 0.3 -> 0.1"


def test_a_plan_of_nothing_makes_nothing(here):
    (here / "params.yaml").write_text(render_params(preset("tiny")))
    assert set(runs("plan").values()) == {"not made yet"}
    assert [path.name for path in here.iterdir()] == ["params.yaml"]


def test_the_summary_as_json_has_the_numbers_of_the_table(project):
    plain = json.loads(call("summary", "--json").stdout)
    table = call("summary").stdout
    for row in plain["accuracy"]:
        assert f"{100 * row['mean']:.1f}" in table
    assert {row["source"] for row in plain["accuracy"]} == {"random", "untuned", "distilled", "full"}
    assert Path(plain["report"]).is_file()
    assert [Path(folder).is_dir() for folder in plain["distilled"].values()] == [True, True]


def test_open_opens_the_report(project, monkeypatch):
    opened = []
    monkeypatch.setattr("click.launch", opened.append)
    result = call("open")
    assert opened == [(project / "artifacts" / "report" / "report.html").as_uri()]
    assert result.stdout.strip() == str(project / "artifacts" / "report" / "report.html")


def test_ui_needs_a_store_and_leads_to_a_server(here, monkeypatch):
    opened = []
    monkeypatch.setattr("click.launch", opened.append)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    refused = call("ui")
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: MLFLOW_TRACKING_URI is none, so nothing is tracked; unset it, or name a store or server\n",
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example")
    shown = call("ui")
    assert "mlflow.example" in shown.stdout
    assert "secret" not in shown.stdout
    assert opened == ["https://me:secret@mlflow.example"]


@pytest.mark.slow
def test_ui_serves_the_store_of_the_environment(here, monkeypatch):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    script = Path(sys.executable).with_name("diffstill")
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{here / 'kept.db'}"}
    with subprocess.Popen(
        [script, "ui", "--port", str(port)], cwd=here, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            answer = requests.get(f"http://127.0.0.1:{port}/health", timeout=10) if _listens(port) else None
        finally:
            os.kill(server.pid, signal.SIGINT)
            server.wait(60)
    assert answer is not None
    assert answer.ok
    assert (here / "kept.db").is_file()


def _listens(port: int) -> bool:
    for _ in range(600):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(0.1)
    return False


# --- for programs -------------------------------------------------------------------------------------------------


def test_every_command_with_something_to_tell_tells_it_as_json():
    silent = {"completion", "schema", "ui"}
    assert {name for name, command in main.commands.items() if not any("--json" in option.opts for option in command.params)} == silent


@pytest.mark.parametrize(
    ("command", "keys"),
    [
        (("prepare", "--images", "new"), {"images", "metrics"}),
        ((*SAMPLE[:-1], "new"), {"distilled", "metrics"}),
        (("preset", "tiny", "--output", "other.yaml"), {"params", "preset"}),
        (("merge", "--output", "merged"), {"folder", "fine-tune"}),
        (("run",), {"cautions", "accuracy", "report", "distilled"}),
        (("export", "artifacts/distilled", "exported"), {"ref", "folder", "format", "images", "seed"}),
        (("download", "artifacts/distilled", "--output", "copy"), {"ref", "distilled"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_json_is_all_there_is_on_standard_output(command, keys, project):
    result = call(*command, "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)) == keys


def test_doctor_as_json_has_a_verdict_of_each_finding(here):
    found = {one["what"]: one for one in json.loads(call("doctor", "--json").stdout)}
    assert found["python"]["verdict"] == "ok"
    assert found["torch"]["found"]
    asked = call("doctor", "--json", "--disk", "0.001")
    assert json.loads(asked.stdout), "nothing else is on standard output"
    assert "disk" in asked.stderr

"""The commands on published versions, as a user gives them: what they print, what they write, what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import diffstill
from chains import contents
from diffstill.artifacts import open_artifact
from diffstill.catalogue import FORMATS
from diffstill.cli import main
from diffstill.config import PublishConfig
from diffstill.errors import DiffstillError
from diffstill.export import Format
from diffstill.registry import Registry
from diffstill.run import run_stage
from experiments import all_lines, make_experiment

NAMES = ("distilled-pets", "distilled-quotes")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Two models in a registry: the first with two versions, the second with one. The folders of the three experiments."""
    root = tmp_path_factory.mktemp("shelf")
    made = []
    with pytest.MonkeyPatch.context() as world:
        world.chdir(root)
        world.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        world.setenv("DIFFSTILL_WORK", str(root / "work"))
        for number, (name, more) in enumerate([(NAMES[0], 0.0), (NAMES[0], 0.2), (NAMES[1], 0.2)]):
            one = make_experiment(root / str(number), side=8 + 4 * number)
            one.judge(all_lines(one.images.digest, more))
            one.summarise()
            paths = {"distilled": one.paths["distilled"], "report": one.root / "report", "card": one.root / "card"}
            run_stage("publish", PublishConfig(name=name, licence="CC-BY-4.0"), paths, force=True)
            made.append(one)
    return root, made


@pytest.fixture
def here(shelf, monkeypatch, tmp_path):
    """The registry from an empty folder with an empty cache."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shelf[0] / 'mlflow.db'}")
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return shelf[1]


def told(*arguments, code: int = 0) -> str:
    """What a command prints; with a code that is not 0, its one message."""
    ended = CliRunner().invoke(main, list(map(str, arguments)))
    assert ended.exit_code == code, ended.output
    if code:
        assert ended.stderr.count("error: ") == 1
        assert "Traceback" not in ended.output
        return ended.stderr
    return ended.stdout


# --- nothing there ---


def test_looking_makes_no_database(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert (told("list"), told("list", "--json"), told("search", "ipc=10")) == ("", "[]\n", "")
    assert "no distilled set of that name" in told("card", "distilled-pets", code=2)
    assert "there are none yet" in told("deprecate", "distilled-pets/1", "--reason", "old", code=2)
    assert list(tmp_path.iterdir()) == []


# --- looking ------------------------------------------------------------------------------------------------------


def test_list_shows_the_last_of_each_and_what_an_alias_leads_to(here):
    """The second of the pets was judged on other images, so the first is still the best; both are shown."""
    rows = {line.split()[0]: line for line in told("list").splitlines()}
    assert list(rows) == ["version", "distilled-pets/1", "distilled-pets/2", "distilled-quotes/1"]
    assert ["newest" in row for row in rows.values()] == [False, False, True, True]
    assert ["best-ipc2" in row for row in rows.values()] == [False, True, False, True]


def test_json_has_every_version_with_all_tags(here):
    versions = json.loads(told("search", "--json"))
    assert [one["ref"] for one in versions] == ["distilled-pets/1", "distilled-pets/2", "distilled-quotes/1"]
    assert [(one["ipc"], one["classes"]) for one in versions] == [(2, 2)] * 3
    for one in versions:
        scores, tags = one["scores"]["2"], one["tags"]
        gain, low, high = (100 * scores[f"val_gain{end}"] for end in ("", "_low", "_high"))
        assert tags["val_gain/ipc2"] == f"{gain:+.1f} points ({low:+.1f} to {high:+.1f})"
        assert tags["test/convnet-2/ipc2"].startswith(f"{100 * scores['students']['convnet-2']['test_mean']:.1f} ± ")
        assert "\u2212" not in json.dumps(one["tags"], ensure_ascii=False)
    assert [one["tags"]["sha256"] for one in versions] == [open_artifact(one.paths["distilled"], "distilled").digest for one in here]


@pytest.mark.parametrize(
    ("terms", "found"),
    [
        (["name=*pets"], ["distilled-pets/1", "distilled-pets/2"]),
        (["resolution=12x12"], ["distilled-pets/2"]),
        (["ipc=2", "resolution=1?x*"], ["distilled-pets/2", "distilled-quotes/1"]),
        (["quotes"], ["distilled-quotes/1"]),
        (["licence=CC-*", "name=nothing"], []),
        (["no_such_tag=*"], []),
        (["alias=newest"], ["distilled-pets/2", "distilled-quotes/1"]),
        (["version=1", "QUOTES"], ["distilled-quotes/1"]),
    ],
)
def test_search_takes_tags_with_wildcards_and_words(here, terms, found):
    assert [one["ref"] for one in json.loads(told("search", *terms, "--json"))] == found


@pytest.mark.parametrize("term", ["", "=", " "])
def test_a_search_for_nothing_is_refused(here, term):
    assert "asks for nothing" in told("search", term, code=2)


def test_a_search_without_a_hit_says_so(here):
    ended = CliRunner().invoke(main, ["search", "ipc=7"])
    assert (ended.exit_code, ended.stdout) == (0, "")
    assert "no version fits" in ended.stderr


def test_card_is_that_of_the_version(here):
    assert told("card", "distilled-pets/1").strip() == (here[0].root / "card" / "card.md").read_text().strip()


def test_lineage_has_every_digest_whole(here):
    shown, plain = told("lineage", "distilled-pets/1"), json.loads(told("lineage", "distilled-pets/1", "--json"))
    for name, artifact in here[0].opened("images", "generator", "latents", "denoiser", "distilled", "untuned").items():
        assert any(line.split()[:2] == [name, artifact.digest] for line in shown.splitlines())
        assert {"name": name, "digest": artifact.digest}.items() <= next(one for one in plain["artifacts"] if one["name"] == name).items()
    assert plain["ref"] == "distilled-pets/1"
    assert any(line.startswith("code ") for line in shown.splitlines())


def test_lineage_of_a_folder_needs_no_registry(here, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    shutil.copytree(here[0].paths["distilled"], "alone")
    named = [line.split("  ")[0] for line in told("lineage", "alone").splitlines()]
    assert named == ["artifact", "raw data", "images", "generator", "latents", "denoiser", "distilled"]
    assert open_artifact(here[0].paths["distilled"], "distilled").digest in told("lineage", here[0].root)


# --- bringing -----------------------------------------------------------------------------------------------------


def test_download_brings_the_very_bytes(here):
    assert told("download", "distilled-pets/1").strip() == "distilled-pets-v1/distilled"
    assert contents(Path("distilled-pets-v1/distilled")) == contents(here[0].paths["distilled"])
    told("download", "distilled-pets/1", "--all")
    assert contents(Path("distilled-pets-v1/card")) == contents(here[0].root / "card")
    assert contents(Path("distilled-pets-v1/report")) == contents(here[0].root / "report")


def test_download_overwrites_nothing(here):
    told("download", "distilled-pets/1", "--output", "mine")
    before = contents(Path("mine"))
    assert "another `distilled`" in told("download", "distilled-pets/2", "--output", "mine", code=2)
    assert contents(Path("mine")) == before


def test_the_card_of_a_folder_lies_beside_it(here):
    assert told("card", here[0].root) == told("card", "distilled-pets/1")
    told("download", here[0].root, "--all", "--output", "copy")
    assert {path.name for path in Path("copy").iterdir()} == {"distilled", "report", "card"}


def test_what_lacks_a_part_is_not_downloaded_in_part(here):
    shutil.copytree(here[0].paths["distilled"], "alone/distilled")
    assert "comes without a `report`" in told("download", "alone", "--all", "--output", "copy", code=2)
    assert not Path("copy").exists()


def test_a_folder_has_no_name_to_be_downloaded_under(here):
    assert "--output" in told("download", here[0].paths["distilled"], code=2)


def test_the_formats_are_those_that_there_are():
    assert set(FORMATS) == set(Format.__args__)


@pytest.mark.parametrize("form", FORMATS)
def test_export_writes_each_format(here, form):
    told("export", "distilled-pets/1", "out", "--format", form, "--ipc", 1)
    suffix = {"imagefolder": ".png", "parquet": ".parquet", "webdataset": ".tar", "huggingface": ".parquet"}[form]
    assert [path for path in Path("out").rglob("*") if path.suffix == suffix]
    if form == "huggingface":
        assert "license: cc-by-4.0" in (Path("out") / "README.md").read_text()


def test_export_takes_the_seed_and_the_first_images_that_are_asked_for(here):
    told("export", "distilled-pets/1", "out", "--ipc", 1, "--seed", 2)
    written = {path.parent.name: path.read_bytes() for path in Path("out").glob("*/*.png")}
    root = here[0].paths["distilled"] / "seed-2"
    assert written == {folder.name: (folder / "00000.png").read_bytes() for folder in root.iterdir() if folder.is_dir()}


def test_load_passes_on_what_it_is_asked_for(here):
    found = diffstill.load("distilled-pets/1", ipc=1, seed=2, transform=lambda image: image.size, target_transform=lambda label: -label)
    assert (found.seed, found.images_per_class, [found[number] for number in range(len(found))]) == (2, 1, [((8, 8), 0), ((8, 8), -1)])
    assert found.card.startswith("# distilled-pets")
    with pytest.raises(DiffstillError, match="whole numbers"):
        diffstill.load("distilled-pets/1", ipc="1")
    whole = diffstill.load(str(here[0].root))
    assert (whole.seed, whole.images_per_class, whole.card) == (0, 2, None)


# --- comparing, deprecating -----------------------------------------------------------------------------------------


def test_compare_writes_a_page(here):
    ended = CliRunner().invoke(main, ["compare", "distilled-pets/1", "distilled-pets/2", "--output", "page.html"])
    assert (ended.exit_code, ended.stderr) == (0, f"wrote {Path('page.html').absolute()}\n")
    assert "distilled-pets/1" in ended.stdout
    assert "<html" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (("card", "distilled-pets/1"), {"ref": "distilled-pets/1"}),
        (("download", "distilled-pets/1"), {"ref": "distilled-pets/1", "distilled": "distilled-pets-v1/distilled"}),
        (("export", "distilled-pets/1", "out", "--ipc", "1"), {"ref": "distilled-pets/1", "folder": "out", "format": "imagefolder", "images": 2}),
        (("compare", "distilled-pets/1", "distilled-pets/2"), {"sets": ["distilled-pets/1", "distilled-pets/2"], "page": "compare.html"}),
        (
            ("deprecate", "distilled-pets/2", "--reason", "blurred"),
            {"deprecated": "blurred", "aliases": {"newest": 1, "best-ipc1": 1, "best-ipc2": 1}},
        ),
        (("deprecate", "distilled-pets/2", "--undo"), {"deprecated": None}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_tell_the_same_to_programs(here, command, wanted):
    plain = json.loads(told(*command, "--json"))
    assert {name: plain[name] for name in wanted} == wanted


def test_compare_refuses_a_page_in_no_folder(here):
    assert "no such folder" in told("compare", "distilled-pets/1", "distilled-pets/2", "--output", "no/page.html", code=2)


def test_deprecated_versions_are_shown_as_such_until_it_is_taken_back(here):
    ended = CliRunner().invoke(main, ["deprecate", "distilled-pets/2", "--reason", "mirrored letters"])
    assert (ended.exit_code, ended.stdout, "newest = 1" in ended.stderr) == (0, "", True)
    assert "deprecated: mirrored letters" in told("search", "name=distilled-pets")
    assert "newest = 2" in CliRunner().invoke(main, ["deprecate", "distilled-pets/2", "--undo"]).stderr
    assert all("deprecated" not in one.tags for one in Registry.here().search())


@pytest.mark.parametrize("options", [[], ["--reason", " \n"], ["--reason", "x" * 501], ["--undo", "--reason", "x"]])
def test_deprecating_needs_a_reason_of_one_short_line(here, options):
    assert "--reason" in told("deprecate", "distilled-pets/2", *options, code=2)


def test_where_all_are_deprecated_the_message_says_so(here):
    told("deprecate", "distilled-quotes", "--reason", "line\nbreak")
    assert Registry.here().search("distilled-quotes")[0].tags["deprecated"] == "line break"
    assert "it has the versions 1 (deprecated)" in told("card", "distilled-quotes", code=2)
    told("deprecate", "distilled-quotes/1", "--undo")


# --- refusing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [["card"], ["download"], ["export", "out"], ["lineage"], ["reproduce"], ["promote"], ["deprecate", "--reason", "x"]],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("", "is no reference"),
        ("distilled-pet", "no distilled set of that name"),
        ("distilled-pets@best-ipc9", "has no alias 'best-ipc9'"),
        ("distilled-pets/9", "version 9"),
    ],
)
def test_a_reference_to_nothing_is_one_message(here, command, ref, message):
    before = set(Path().iterdir())
    assert message in told(command[0], ref, *command[1:], code=2)
    assert set(Path().iterdir()) == before


@pytest.mark.parametrize("command", ["list", "search", "card x", "download x", "export x out", "lineage x", "reproduce x", "promote x"])
def test_without_a_registry_each_says_what_to_set(here, monkeypatch, command):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert "MLFLOW_TRACKING_URI" in told(*command.split(), code=2)

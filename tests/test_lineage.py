"""Lineage: every artifact from the raw data on, in order, by the names that a chain gives, with the parameters that made it."""

import json
import shutil
from pathlib import Path

import pytest

from chains import Chain
from diffstill.artifacts import ANCESTORS, Artifact, new_artifact, open_artifact, read_manifest
from diffstill.config import PrepareConfig, PublishConfig, ReportConfig, SampleConfig
from diffstill.errors import DiffstillError
from diffstill.lineage import SECTIONS, Lineage
from diffstill.plan import STAGES, chain
from experiments import Experiment, all_lines, make_experiment, write_sampled


@pytest.fixture(scope="module")
def traced(tiny_chain: Chain) -> Lineage:
    return Lineage.of(open_artifact(tiny_chain.artifacts / "report", "report"))


@pytest.fixture
def made(tmp_path: Path) -> Experiment:
    made = make_experiment(tmp_path)
    made.judge(all_lines(made.images.digest))
    made.summarise()
    return made


def report_of(made: Experiment) -> Artifact:
    return open_artifact(made.root / "report", "report")


# --- artifacts ----------------------------------------------------------------------------------------------------


def test_sections_are_those_of_the_stages():
    assert {stage.output: name for name, stage in STAGES.items()} == SECTIONS


def test_names_are_the_folders_of_the_chain(tiny_chain, traced):
    outputs = {step.output(Path()).as_posix() for step in chain(tiny_chain.params)}
    assert {one.name for one in traced.artifacts} == outputs
    for one in traced.artifacts:
        assert one.digest == read_manifest(tiny_chain.artifacts / one.name, one.manifest.kind).digest
        assert traced[one.name] == one


def test_inputs_come_before_what_is_made_from_them(traced):
    seen = {""}
    for one in traced.artifacts:
        assert set(one.manifest.inputs.values()) <= seen
        seen.add(one.digest)
    assert [one.name for one in traced.artifacts][:6] == ["images", "generator", "latents", "denoiser", "distilled", "untuned"]
    assert traced.artifacts[-1].name == "report"


def test_artifacts_are_listed_once_however_many_lead_to_them(tiny_chain, traced):
    made, told = (open_artifact(tiny_chain.artifacts / name, name) for name in ("distilled", "report"))
    assert Lineage.of(made, told) == Lineage.of(told, made) == traced
    alone = [one.name for one in Lineage.of(made).artifacts]
    assert alone == ["images", "generator", "latents", "denoiser", "distilled"]
    assert [one.name for one in Lineage.of(open_artifact(tiny_chain.artifacts / "untuned", "distilled")).artifacts] == [
        "images",
        "generator",
        "untuned",
    ]


def test_an_absent_name_says_what_there_is(traced):
    with pytest.raises(DiffstillError, match="has 0 artifacts 'weights', expected one; it has images, generator, latents, "):
        traced["weights"]


def test_a_name_that_two_have_is_refused(made, tmp_path):
    write_sampled(tmp_path / "again", "distilled", made.opened("generator", "denoiser"), made.images, draw=1)
    both = Lineage.of(made.opened("distilled")["distilled"], open_artifact(tmp_path / "again", "distilled"))
    with pytest.raises(DiffstillError, match="has 2 artifacts 'distilled'"):
        both["distilled"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "missing, so the lineage has a gap"), (lambda path: path.write_text("{}"), "not a manifest of schema 1")],
    ids=["missing", "damaged"],
)
def test_a_damaged_or_absent_ancestor_is_one_clear_message(made, damage, message):
    digest = made.opened("latents")["latents"].digest
    damage(made.root / "report" / ANCESTORS / f"{digest}.json")
    with pytest.raises(DiffstillError, match=message) as refusal:
        Lineage.of(read_manifest(made.root / "report", "report"))
    assert f"report/{ANCESTORS}/{digest}.json" in str(refusal.value)


# --- parameters ---------------------------------------------------------------------------------------------------


def test_the_parameters_are_those_that_made_the_chain(tiny_chain, traced):
    """The section `publish` made nothing here: it has its defaults."""
    assert tiny_chain.params.publish != PublishConfig()
    assert traced.params() == tiny_chain.params.model_copy(update={"publish": PublishConfig()})


def test_with_a_card_they_have_the_section_that_published(tiny_chain, tmp_path):
    opened = {name: open_artifact(tiny_chain.artifacts / name, name) for name in ("distilled", "report")}
    with new_artifact(tmp_path / "card", "card", tiny_chain.params.publish, opened):
        pass
    assert Lineage.of(open_artifact(tmp_path / "card", "card")).params() == tiny_chain.params


@pytest.mark.parametrize("name", ["distilled", "untuned"])
def test_a_set_alone_has_the_parameters_that_made_it(tiny_chain, name):
    """Two images per class, fewer than `evaluate` asks for by default."""
    found = Lineage.of(open_artifact(tiny_chain.artifacts / name, "distilled")).params()
    for stage in ("prepare", "pretrain", "sample", *(("encode", "finetune") if name == "distilled" else ())):
        assert found.section(stage) == tiny_chain.params.section(stage), stage
    assert (found.report, found.evaluate.images_per_class) == (ReportConfig(), (2,))


def test_sets_of_different_settings_have_no_common_parameters(made):
    shutil.rmtree(made.paths["untuned"])
    write_sampled(made.paths["untuned"], "untuned", made.opened("generator"), made.images, seeds=(7,))
    made.summarise()
    with pytest.raises(DiffstillError, match="two artifacts were made by different sections `sample`"):
        Lineage.of(report_of(made)).params()


def test_parameters_of_another_release_are_refused(tmp_path):
    class Later(SampleConfig):
        sharpness: int = 3

    with new_artifact(tmp_path / "set", "distilled", Later(), {}) as draft:
        draft.facts["source"] = "untuned"
    with pytest.raises(DiffstillError, match=r"another version of diffstill .*`sample\.sharpness` is not a knob.*use the commit that made it"):
        Lineage.of(open_artifact(tmp_path / "set", "distilled")).params()


# --- raw data -----------------------------------------------------------------------------------------------------

COMMIT, MD5 = "4b825dc642cb6eb9a060e54bf8d69288fbee4904", "d41d8cd98f00b204e9800998ecf8427e.dir"
PINNED = f"dvc+https://host/org/repo.git?rev={COMMIT}&path=data/some%20images&md5={MD5}"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"source": "digits"}),
        ({"source": "fashion-mnist", "location": "data"}, {"source": "fashion-mnist", "location": "data"}),
        ({"source": "folder", "location": "data?rev=x"}, {"source": "folder", "location": "data?rev=x"}),
        ({"source": "folder", "location": "s3://bucket/raw"}, {"source": "folder", "location": "s3://bucket/raw"}),
        ({"source": "folder", "location": PINNED}, {"source": "folder", "location": PINNED, "revision": COMMIT, "md5": MD5}),
        (
            {"source": "folder", "location": "dvc+file:/srv/repo?rev=v1&path=a"},
            {"source": "folder", "location": "dvc+file:/srv/repo?rev=v1&path=a", "revision": "v1"},
        ),
    ],
    ids=["embedded", "elsewhere", "folder", "s3", "dvc pinned", "dvc"],
)
def test_the_raw_data_are_named_with_their_revision(tmp_path, config, expected):
    made = make_experiment(tmp_path, data=PrepareConfig(**config))
    traced = Lineage.of(made.opened("distilled")["distilled"])
    assert traced.data() == expected
    assert next(traced.lines()) == ("raw data", expected.get("location", expected["source"]), "")


# --- told ---------------------------------------------------------------------------------------------------------


def test_lines_name_origins_as_folders_and_count_the_scores(traced):
    lines = {name: origins for name, _, origins in traced.lines()}
    assert lines["images"] == "raw data"
    assert set(lines["distilled"].split(", ")) == {"generator", "denoiser"}
    assert set(lines["report"].split(", ")) == {"images", "denoiser", "distilled", "untuned", "3 scores"}
    assert [name for name, _, _ in traced.lines()] == ["raw data", *(one.name for one in traced.artifacts)]


def test_as_json_it_holds_what_the_manifests_say(traced):
    told = json.loads(json.dumps(traced.plain()))
    assert told["data"] == {"source": "digits"}
    assert [step["name"] for step in told["artifacts"]] == [one.name for one in traced.artifacts]
    for step, one in zip(told["artifacts"], traced.artifacts, strict=True):
        assert set(step) == {"name", "digest", "kind", "inputs", "config", "facts"}
        assert (step["digest"], step["inputs"], step["config"], step["facts"]) == (
            one.digest,
            one.manifest.inputs,
            one.manifest.config,
            one.manifest.facts,
        )


def test_equal_chains_in_other_folders_have_equal_lineages(made, tmp_path):
    shutil.copytree(tmp_path / "report", tmp_path / "elsewhere" / "copy")
    copy = open_artifact(tmp_path / "elsewhere" / "copy", "report")
    assert Lineage.of(copy) == Lineage.of(report_of(made))
    assert str(tmp_path) not in json.dumps(Lineage.of(copy).plain())

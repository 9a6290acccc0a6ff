"""Two sets side by side: hand-computed numbers, where lineages part, what must not be compared, and the page."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diffstill import compare as comparing
from diffstill.artifacts import new_artifact, open_artifact, read_manifest
from diffstill.compare import compare, render, text
from diffstill.config import FinetuneConfig, Params, PrepareConfig, PretrainConfig, PublishConfig, SampleConfig, VaeConfig
from diffstill.errors import DiffstillError
from diffstill.html import strip
from diffstill.registry import Registry, find
from diffstill.run import run_stage
from experiments import CLASSES, STUDENT, all_lines, make_experiment

VOID = {"meta", "img", "br", "col"}
A = [[0.61, 0.63], [0.60, 0.64], [0.66, 0.62]]
B = [[0.70, 0.72], [0.69, 0.75], [0.74, 0.78]]


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every element closes in order."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def runs(made, accuracies, size=1, **changes):
    """Runs on the distilled set by generation seed and student seed; accuracy on val is half of that on test."""
    return [
        made.line("distilled", size, generation, student, accuracy, **changes)
        for generation, students in enumerate(accuracies)
        for student, accuracy in enumerate(students)
    ]


def judged(root, accuracies=None, size=1, changes=None, **options):
    """An experiment with a report; all runs of a whole one unless accuracies are given."""
    made = make_experiment(root, **options)
    made.judge(runs(made, accuracies, size, **(changes or {})) if accuracies else all_lines(made.images.digest))
    made.summarise()
    return made


def compared(one, other):
    return compare(find(str(one.root)), find(str(other.root)))


def resample(made, config=None, name="distilled", facts=None, files=None):
    """Write a sampled set anew, changed."""
    old = open_artifact(made.paths[name], "distilled")
    inputs = made.opened("generator", "denoiser") if name == "distilled" else made.opened("generator")
    kept = made.root / "kept"
    old.folder.rename(kept)
    with new_artifact(made.paths[name], "distilled", config or SampleConfig(seeds=(0, 1, 2), images_per_class=2), inputs) as draft:
        for path in (path for path in old.manifest.files if path.startswith("seed-")):
            (draft.folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kept / path, draft.folder / path)
        for path, content in (files or {}).items():
            if content is None:
                (draft.folder / path).unlink()
            else:
                (draft.folder / path).write_bytes(content)
        draft.facts |= old.facts | (facts or {})
    shutil.rmtree(kept)


def png(shape):
    file = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two sets from memories of other policies, judged alike."""
    root = tmp_path_factory.mktemp("pair")
    return judged(root / "a", A), judged(root / "b", B, policy="fifo", draw=1)


@pytest.fixture(scope="module")
def comparison(pair):
    return compared(*pair)


# The same or not


def test_a_set_is_the_same_as_its_copy(tmp_path):
    one = judged(tmp_path / "a")
    shutil.copytree(one.root, tmp_path / "b")
    found = compare(find(str(one.root)), find(str(tmp_path / "b")))
    assert found.identical
    assert found.same_images
    assert (found.headline, found.findings, found.settings) == ("The same set, byte for byte.", [], {})
    assert {pair.verdict for pair in (*found.facts, *found.digests, *found.data)} == {"equal"}
    assert {score.test.reason for score in found.scores} == {"the same runs"}
    assert "0 settings differ" in text(found)


def test_one_byte_makes_another_set(tmp_path):
    one, other = judged(tmp_path / "a"), make_experiment(tmp_path / "b")
    resample(other, files={f"seed-2/{CLASSES[0]}/00001.png": png((8, 8))})
    found = compared(one, other)
    assert not found.identical
    assert not found.same_images
    assert found.common == (12, 11)
    assert "Equal bytes: 11 of the 12 images with the same seed, class and number in both." in found.findings


def test_the_same_images_may_be_made_in_two_ways(tmp_path):
    found = compared(judged(tmp_path / "a"), judged(tmp_path / "b", policy="fifo"))
    assert not found.identical
    assert found.same_images
    assert found.headline == "The same images, byte for byte, made in two ways."


def test_sets_without_a_common_seed_have_no_counterparts(tmp_path):
    found = compared(make_experiment(tmp_path / "a", seeds=(0, 1)), make_experiment(tmp_path / "b", seeds=(2,)))
    assert found.common == (0, 0)
    assert any(finding.startswith("No image of one has a counterpart") for finding in found.findings)


def test_a_set_of_fewer_seeds_is_contained(tmp_path):
    found = compared(make_experiment(tmp_path / "a", seeds=(0,)), make_experiment(tmp_path / "b"))
    assert (found.common, found.same_images) == ((4, 4), False)


# Where the lineages part


def test_lineages_part_at_the_first_artifact_that_differs(comparison):
    assert (comparison.parting.same, comparison.parting.first) == (("images", "generator", "latents"), "denoiser")
    assert [(knob.name, knob.first, knob.second) for knob in comparison.parting.knobs] == [("finetune.policy", '"redundancy"', '"fifo"')]
    assert comparison.findings[0] == 'Same real images, generator and latents, other denoiser: `finetune.policy` "redundancy" against "fifo".'


def test_settings_of_later_steps_are_told_after_the_first(tmp_path):
    one, other = make_experiment(tmp_path / "a"), make_experiment(tmp_path / "b", data=PrepareConfig(seed=7), policy="fifo", draw=1)
    found = compared(one, other)
    assert found.findings[:2] == [
        "They part at the first step, the real images: `prepare.seed` 0 against 7.",
        'Settings of later steps differ too: `finetune.policy` "redundancy" against "fifo".',
    ]


def test_a_difference_that_no_setting_made_is_left_to_the_code(tmp_path):
    found = compared(make_experiment(tmp_path / "a"), make_experiment(tmp_path / "b", draw=1))
    assert (found.parting.first, found.parting.knobs) == ("distilled", ())
    assert "other distilled set: the settings and inputs of this step are equal, so the code, its libraries or the machine made" in found.findings[0]


def test_other_data_at_the_same_place_is_said(tmp_path):
    found = compared(make_experiment(tmp_path / "a"), make_experiment(tmp_path / "b", side=16))
    assert "so the raw data, the code, its libraries or the machine made the difference" in found.findings[0]


def test_an_untuned_set_parts_where_it_is_drawn(tmp_path):
    made = judged(tmp_path / "a")
    found = compare(find(str(made.paths["untuned"])), find(str(made.paths["distilled"])))
    assert "A is drawn from the untuned generator, B from a fine-tuned generator" in found.findings[0]
    assert found.parting.same == ("images", "generator")
    assert found.lone_sections == {"B": ("encode", "finetune", "evaluate", "report")}


# Scores


def test_differences_are_paired_by_generation_seed(comparison):
    (score,) = comparison.scores
    assert (score.student, score.images_per_class) == (STUDENT, 1)
    for difference, scale in ((score.test, 1), (score.validation, 0.5)):
        ours, theirs = ([scale * sum(seed) / 2 for seed in accuracies] for accuracies in (B, A))
        expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert difference.gain.points == pytest.approx(scale * 100 * (0.73 - 0.62666667))
        assert (difference.gain.low, difference.gain.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert (score.first.test.mean, score.first.test.runs) == (pytest.approx(0.62666667), 6)
    assert score.first.test.sd == pytest.approx(np.std(np.ravel(A), ddof=1))
    assert score.second.validation.mean == pytest.approx(0.365)


def test_sets_of_other_generation_seeds_are_compared_by_welch(tmp_path):
    found = compared(judged(tmp_path / "a", A), judged(tmp_path / "b", B[:2], draw=1))
    ours, theirs = ([sum(seed) / 2 for seed in accuracies] for accuracies in (B[:2], A))
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert (found.scores[0].test.gain.low, found.scores[0].test.gain.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert ", Welch</span>" in render(found)
    assert ", paired</span>" not in render(found)


def test_numbers_are_printed(comparison):
    assert "│ convnet-2 │   1 │ 31.3 ± 1.1 (6) │ 36.5 ± 1.7 (6) │ +5.2" in text(comparison)
    page = Page(render(comparison)).text.replace("\xa0", " ")
    assert "62.7 ± 2.2 6 runs 73.0 ± 3.3 6 runs +10.3" in page
    assert "B clearly better" in page
    assert "On val, B is shown to be better in 1 of 1 comparison, A in 0." in page


def test_a_swap_mirrors_everything(pair, comparison):
    swapped = compared(*reversed(pair))
    (score,), (mirrored,) = comparison.scores, swapped.scores
    assert (mirrored.first, mirrored.second) == (score.second, score.first)
    for there, back in ((score.test.gain, mirrored.test.gain), (score.validation.gain, mirrored.validation.gain)):
        assert (back.points, back.low, back.high) == (-there.points, -there.high, -there.low)
    assert {(knob.name, knob.second, knob.first) for knob in swapped.settings["finetune"]} == {
        (knob.name, knob.first, knob.second) for knob in comparison.settings["finetune"]
    }
    assert swapped.names == comparison.names[::-1]
    assert swapped.common == comparison.common
    assert swapped.findings[-2:] == [
        "On val, B is shown to be better in 0 of 1 comparison, A in 1.",
        "One fine-tune alone stands behind A and B: a claim about the method needs several (`finetune.seeds`).",
    ]


def test_one_generation_seed_supports_no_claim(tmp_path):
    found = compared(judged(tmp_path / "a", A[:1]), judged(tmp_path / "b", B[:1], draw=1))
    assert found.scores[0].test.gain.points == pytest.approx(9.0)
    assert found.scores[0].test.gain.low is None
    assert "no interval, so no claim" in render(found)
    assert "+9.0 │" in text(found)


def test_other_real_images_are_not_compared(tmp_path):
    found = compared(judged(tmp_path / "a", A), judged(tmp_path / "b", B, data=PrepareConfig(seed=7)))
    assert (found.scores[0].test.gain, found.scores[0].test.reason) == (None, "not comparable: judged on other real images")
    assert "62.7" in render(found)


def test_another_protocol_is_not_compared(tmp_path):
    found = compared(judged(tmp_path / "a", A), judged(tmp_path / "b", B, changes={"protocol": "short-200"}, draw=1))
    assert found.scores[0].validation.gain is None
    assert found.scores[0].validation.reason == "not comparable: judged by protocol short-20 against short-200"
    assert "B − A: not comparable: judged by protocol short-20 against short-200" in text(found)
    assert not any("shown to be better" in finding for finding in found.findings)


def test_other_student_seeds_are_not_compared(tmp_path):
    found = compared(judged(tmp_path / "a", A), judged(tmp_path / "b", [seeds[:1] for seeds in B], draw=1))
    assert found.scores[0].test.gain is None
    assert found.scores[0].test.reason == "not comparable: judged by student seeds 0, 1 against 0"


def test_other_students_and_sizes_stand_alone(tmp_path):
    found = compared(judged(tmp_path / "a", A, size=2), judged(tmp_path / "b", B, changes={"student": "convnet-3"}, draw=1))
    rows = [(score.student, score.images_per_class, score.first is None, score.second is None, score.test.reason) for score in found.scores]
    lacks = "has no runs of this student and size"
    assert rows == [("convnet-2", 2, False, True, f"not comparable: B {lacks}"), ("convnet-3", 1, True, False, f"not comparable: A {lacks}")]


def test_without_a_val_split_test_alone_is_compared(tmp_path):
    found = compared(judged(tmp_path / "a", A, changes={"accuracy_val": None}), judged(tmp_path / "b", B, draw=1))
    (score,) = found.scores
    assert (score.validation.gain, score.validation.reason) == (None, "not comparable: not judged on a val split")
    assert score.test.gain.verdict == "gain"
    assert "On test, B is shown to be better in 1 of 1 comparison, A in 0." in found.findings


@pytest.mark.parametrize("reported", [True, False])
def test_a_set_without_a_report_says_so(tmp_path, reported):
    one = judged(tmp_path / "a", A) if reported else make_experiment(tmp_path / "a")
    found = compared(one, make_experiment(tmp_path / "b", draw=1))
    assert found.unreported == (("B",) if reported else ("A", "B"))
    assert len(found.scores) == reported
    for shown in (text(found), Page(render(found)).text):
        assert "B comes without a report, so its scores are not known" in shown
        assert ("not comparable: B comes without a report" in shown) == reported


def test_a_report_on_another_set_is_not_taken(tmp_path):
    made = judged(tmp_path / "a", A)
    resample(made, config=SampleConfig(seeds=(0, 1, 2), images_per_class=2, guidance=9.0))
    assert compared(made, made).unreported == ("A", "B")


# Settings


def test_knobs_are_told_with_their_descriptions_and_all_equal_ones_counted(comparison):
    assert set(comparison.settings) == {"finetune"}
    (knob,) = comparison.settings["finetune"]
    assert knob.note == FinetuneConfig.model_fields["policy"].description
    sections = Params().model_dump(exclude={"publish"})
    nested = {name: sections["pretrain"].pop(name) for name in ("vae", "dit")}
    knobs = sum(map(len, [*sections.values(), *nested.values()]))
    assert comparison.settings_told == f"1 setting differs, {knobs - 1} are equal."


def test_nested_knobs_are_flat(tmp_path):
    one, other = make_experiment(tmp_path / "a"), make_experiment(tmp_path / "b")
    config = PretrainConfig(vae=VaeConfig(channels=(8, 8), steps=3))
    with new_artifact(other.paths["generator"], "generator", config, other.opened("images")):
        pass
    with new_artifact(other.paths["untuned"], "distilled", SampleConfig(), other.opened("generator")) as draft:
        draft.facts |= open_artifact(one.paths["untuned"], "distilled").facts
        shutil.copytree(one.paths["untuned"], draft.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json", "ancestors"))
    found = compare(find(str(one.paths["untuned"])), find(str(other.paths["untuned"])))
    shown = {(knob.name, knob.first, knob.second, knob.note) for knob in found.settings["pretrain"]}
    assert ("pretrain.vae.channels", "[16, 32]", "[8, 8]", VaeConfig.model_fields["channels"].description) in shown
    assert {knob.name for knob in found.parting.knobs} == {"pretrain.vae.channels", "pretrain.vae.steps"}


def test_knobs_of_another_version_are_shown_raw(tmp_path):
    class Later(SampleConfig):
        temperature: float = 0.5

    one, other = make_experiment(tmp_path / "a"), make_experiment(tmp_path / "b")
    resample(other, config=Later(seeds=(0, 1, 2), images_per_class=2))
    (knob,) = compared(one, other).settings["sample"]
    assert (knob.name, knob.first, knob.second, knob.verdict) == ("sample.temperature", None, "0.5", "only B")
    assert knob.note == "not a knob of this version of diffstill"
    assert "sample.temperature  absent against 0.5" in text(compared(one, other))


def test_a_section_that_made_unlike_artifacts_is_told_by_artifact(tmp_path):
    one, other = judged(tmp_path / "a"), make_experiment(tmp_path / "b")
    resample(other, config=SampleConfig(seeds=(0, 1, 2), images_per_class=2, steps=7), name="untuned")
    other.judge(all_lines(other.images.digest))
    other.summarise()
    found = compared(one, other)
    assert found.identical
    assert {title: [knob.name for knob in knobs] for title, knobs in found.settings.items()} == {"sample of untuned": ["sample.steps"]}


def test_many_differing_knobs_are_cut_short_in_the_sentence_alone(tmp_path):
    one, other = make_experiment(tmp_path / "a"), make_experiment(tmp_path / "b")
    changes = {"sampler": "ddpm", "steps": 7, "guidance": 4.0, "chunk_size": 3, "classes": tuple("abcdefghijklmnopqrstuvwxyz")}
    resample(other, config=SampleConfig(seeds=(0, 1, 2), images_per_class=2, **changes))
    found = compared(one, other)
    assert found.findings[0].endswith("and 2 more.")
    assert "…" in found.findings[0]
    assert len(found.settings["sample"]) == 5
    assert '"x", "y", "z"]' in Page(render(found)).text


# Data, code, images


def test_data_and_digests_stand_side_by_side(tmp_path):
    location = "dvc+https://example.org/birds?rev=v1&path=train&md5=abc.dir"
    data = PrepareConfig(source="folder", location=location)
    found = compared(make_experiment(tmp_path / "a"), judged(tmp_path / "b", data=data))
    assert {(one.name, one.first, one.second) for one in found.data} == {
        ("source", "digits", "folder"),
        ("location", None, location),
        ("revision", None, "v1"),
        ("md5", None, "abc.dir"),
    }
    digests = {one.name: one for one in found.digests}
    assert digests["images"].first == read_manifest(tmp_path / "a" / "images", "images").digest
    assert digests["images"].verdict == "different"
    assert digests["report"].verdict == "only B"
    assert found.code == ()
    assert "Neither is a published version" in Page(render(found)).text


def test_versions_tell_what_published_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFSTILL_IMAGE", "registry.example/diffstill@sha256:0123")
    monkeypatch.chdir(tmp_path)
    one, other = judged(tmp_path / "a", A), judged(tmp_path / "b", B, policy="fifo", draw=1)
    for made in (one, other):
        paths = {"distilled": made.paths["distilled"], "report": made.root / "report", "card": made.root / "card"}
        run_stage("publish", PublishConfig(name="tiny", gate="off", licence="CC0"), paths)
    Registry.here().deprecate(find("tiny/1").version, "blurred")
    found = compare(find("tiny/1"), find("tiny@newest"))
    assert found.names == ("tiny/1", "tiny/2")
    code = {one.name: (one.first, one.second) for one in found.code}
    assert code["container image"] == ("registry.example/diffstill@sha256:0123",) * 2
    assert code["licence"] == ("CC0", "CC0")
    assert {"code", "project's commit", "diffstill"} <= code.keys()
    facts = {one.name: (one.first, one.second) for one in found.facts}
    assert facts["Deprecated"] == ("blurred", None)
    assert "newest" in facts["Aliases"][1]
    local = compared(one, other)
    assert (found.scores, found.settings, found.digests, found.parting) == (local.scores, local.settings, local.digests, local.parting)


@pytest.mark.parametrize(
    ("tag", "shown"), [('{"torch": "2.9"}', {"environment: torch": "2.9"}), ("{", {"environment": "{"}), ("[1]", {"environment": "[1]"})]
)
def test_an_environment_is_told_by_its_parts(tag, shown):
    assert comparing._environment(tag) == shown


def test_the_page_holds_the_pixels_of_the_first_seed(pair, comparison):
    images = Page(render(comparison)).all("img")
    assert [image["alt"] for image in images[:2]] == [f"2 images of class {CLASSES[0]}: {letter}" for letter in "AB"]
    for made, image in zip(pair, images, strict=False):
        folder = made.paths["distilled"] / "seed-0" / CLASSES[0]
        expected = strip(np.stack([np.asarray(Image.open(folder / f"0000{number}.png"))[None] for number in range(2)]), 48)
        with Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix("data:image/png;base64,")))) as found:
            assert np.array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected))


def test_classes_of_one_set_alone_are_said(tmp_path):
    found = compared(
        make_experiment(tmp_path / "a", classes=("cat", "dog")), make_experiment(tmp_path / "b", classes=("dog", "eel"), channels=3, side=80)
    )
    assert [(row.name, row.first is None, row.second is None) for row in found.images] == [
        ("cat", False, True),
        ("dog", False, False),
        ("eel", True, False),
    ]
    page = Page(render(found))
    assert "not in B" in page.text
    assert "not in A" in page.text
    assert "8 × 8 pixels, grey 80 × 80 pixels, colour different" in page.text


def test_very_many_classes_are_cut_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "CLASSES_SHOWN", 1)
    made = make_experiment(tmp_path / "a", per_class=12)
    found = compared(made, made)
    assert len(found.images) == 1
    assert found.images[0].first.shape == (10, 1, 8, 8)
    assert "The first 1 of 2 classes." in Page(render(found)).text


# The page and the terminal


def test_page_is_whole_self_contained_and_accessible(comparison):
    page = render(comparison)
    parsed = Page(page)
    addresses = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("src", "href", "srcset", "data")]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"@import|url\(|http", page)
    assert all(image.get("alt") for image in parsed.all("img"))
    assert all(head.get("scope") in {"col", "colgroup", "row", "rowgroup"} for head in parsed.all("th"))
    assert all(div.get("aria-label") or div.get("aria-labelledby") for div in parsed.all("div") if div.get("role") == "region")
    assert ("html", {"lang": "en"}) in parsed.tags
    assert "prefers-color-scheme: dark" in page


def test_everything_from_outside_is_shown_literally(tmp_path):
    evil = '<script>alert("1")</script>'
    student = "<script>alert('1')<b>"
    changes = {"protocol": evil, "student": student}
    one = judged(tmp_path / "<b>a", A, changes=changes, data=PrepareConfig(source="folder", location=f"data/{evil}`x"), classes=("<i>cat", '"dog"'))
    other = judged(tmp_path / "b", B)
    page = render(compared(one, other))
    assert "<script" not in page
    assert "<b>a" not in page
    assert "<i>" not in page
    parsed = Page(page)
    for shown in ("<b>a", f"data/{evil}`x", student, "<i>cat"):
        assert shown in parsed.text
    assert any("of class <i>cat: A" in image["alt"] for image in parsed.all("img"))


def test_no_control_character_reaches_the_terminal(tmp_path):
    one = judged(tmp_path / "a\x1b[31m", A, changes={"student": "net\x9b2J\x07"})
    shown = text(compared(one, judged(tmp_path / "b", B)))
    assert "a\ufffd[31m" in shown
    assert "net\ufffd2J" in shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


def test_equal_sets_give_equal_pages(tmp_path, monkeypatch, pair):
    pages = []
    for world in ("one", "two"):
        for made, name in zip(pair, "ab", strict=True):
            shutil.copytree(made.root, tmp_path / world / name)
        monkeypatch.chdir(tmp_path / world)
        found = compare(find("a"), find("b"))
        pages.append((render(found), text(found)))
    assert pages[0] == pages[1]


@pytest.mark.xdist_group("chain")
def test_a_real_chain_is_compared(tiny_chain, tmp_path):
    shutil.copytree(tiny_chain.artifacts, tmp_path / "chain")
    found = compare(find(str(tiny_chain.artifacts)), find(str(tmp_path / "chain")))
    assert found.identical
    assert [score.images_per_class for score in found.scores] == [1, 2]
    assert [row.name for row in found.images] == ["0", "1", "2"]
    untuned = compare(find(str(tiny_chain.artifacts)), find(str(tiny_chain.artifacts / "untuned")))
    assert (untuned.parting.same, untuned.common) == (("images", "generator"), (12, 0))
    Page(render(untuned))


# Bad input


def test_a_flipped_byte_is_refused_by_name(tmp_path):
    made = judged(tmp_path / "a")
    path = made.paths["distilled"] / "seed-0" / CLASSES[0] / "00000.png"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DiffstillError, match=r"00000\.png: content differs"):
        compared(made, made)


def test_a_damaged_report_is_refused(tmp_path):
    made = judged(tmp_path / "a")
    (made.root / "report" / "scores.jsonl").write_text("{}\n")
    with pytest.raises(DiffstillError, match=r"scores\.jsonl: content differs"):
        compared(make_experiment(tmp_path / "b"), made)


def test_a_gap_in_the_lineage_is_refused(tmp_path):
    made = make_experiment(tmp_path / "a")
    with new_artifact(tmp_path / "x" / "distilled", "distilled", SampleConfig(), {}) as draft:
        draft.facts |= open_artifact(made.paths["distilled"], "distilled").facts
    with pytest.raises(DiffstillError, match="the lineage has 0 artifacts 'images'"):
        compare(find(str(tmp_path / "x")), find(str(made.root)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"facts": {"seeds": []}}, "does not say what a distilled set must .`seeds`"),
        ({"facts": {"side": "8"}}, "does not say what a distilled set must .`side`"),
        ({"facts": {"images_per_class": 3}}, r"lists no seed-0/cat & <dog>/00002\.png"),
        ({"facts": {"classes": ["x"]}}, r"lists no seed-0/x/00000\.png"),
        ({"files": {f"seed-0/{CLASSES[0]}/00000.png": b"no picture"}}, r"00000\.png: cannot be read as PNG"),
        ({"files": {f"seed-0/{CLASSES[0]}/00000.png": png((8, 9))}}, r"00000\.png: is no PNG of 8 x 8 pixels in 1 channel;"),
        ({"files": {f"seed-0/{CLASSES[0]}/00001.png": png((8, 8, 3))}}, r"00001\.png: is no PNG of 8 x 8 pixels in 1 channel;"),
        ({"files": {f"seed-0/{CLASSES[0]}/00001.png": None}}, r"lists no seed-0/cat & <dog>/00001\.png"),
    ],
)
def test_sets_that_do_not_hold_what_they_say_are_refused(tmp_path, changes, message):
    made = make_experiment(tmp_path / "a")
    resample(made, **changes)
    with pytest.raises(DiffstillError, match=message):
        compared(made, made)

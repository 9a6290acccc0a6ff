"""Stage `publish`: the gate, the card, the tags; where versions are kept is a list here."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from scipy import stats

from chains import contents
from diffstill.artifacts import MANIFEST, open_artifact
from diffstill.config import PrepareConfig, PublishConfig, ReportConfig
from diffstill.errors import DiffstillError, GateError
from diffstill.lineage import Lineage
from diffstill.pictures import read_png
from diffstill.stages.publish import Release, publish
from experiments import DISTILLED, RANDOM, STUDENT, Experiment, all_lines, make_experiment

BETTER = 0.2
"""Added to the accuracy of all distilled runs, it makes a gain for both sizes; without it there is one for 1 image per class alone."""
HOSTILE = ("a|b", "x](evil.example)", "`tick`", "*bold* _too_", "<script>alert(1)", "50% & more", "ünï cödé", "![no", "&lt;")


@dataclass
class Shelf:
    """A registry that keeps releases in a list."""

    releases: list[Release] = field(default_factory=list)

    def publish(self, release: Release, record) -> int:
        self.releases.append(release)
        return len(self.releases)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def judged(root: Path, more: float = BETTER, lines=None, **wanted) -> Experiment:
    made = make_experiment(root, **wanted)
    made.judge(all_lines(made.images.digest, more) if lines is None else lines(made))
    made.summarise()
    return made


@pytest.fixture
def made(tmp_path) -> Experiment:
    return judged(tmp_path)


def published(made: Experiment, shelf: Shelf, config: PublishConfig | None = None, card: str = "card", **options) -> dict[str, float]:
    places = {"distilled": made.paths["distilled"], "report": made.root / "report", "card": made.root / card}
    return publish(config or PublishConfig(), **places, registry=shelf, **options)


def told(values, base) -> str:
    """A gain with its interval as scipy has it."""
    low, high = stats.ttest_ind(values, base, equal_var=False).confidence_interval(0.95)
    return "{:+.1f} points ({:+.1f} to {:+.1f})".format(*(100 * value for value in (np.mean(values) - np.mean(base), low, high)))


def by_seed(values, more: float = 0.0) -> np.ndarray:
    return np.mean(values, axis=1) + more * np.array([0.98, 1.0, 1.02])


# --- the gate -----------------------------------------------------------------------------------------------------


def pairs(ours, real, size: int = 2):
    """Runs by accuracy on val, one per generation seed."""

    def lines(made: Experiment) -> list[dict]:
        found = (("distilled", ours), ("random", real))
        return [
            made.line(source, size, seed, 0, 0.5, accuracy_val=value) | {"accuracy_test": 0.9 if source == "distilled" else 0.1}
            for source, values in found
            for seed, value in enumerate(values)
        ]

    return lines


@pytest.mark.parametrize(
    ("ours", "real", "numbers"),
    [
        ([0.50, 0.54, 0.58], [0.50, 0.53, 0.56], "reaches 54.0 % on val, +1.0 points (−7.3 to +9.3) against random real"),
        ([0.30, 0.31, 0.32], [0.50, 0.51, 0.52], "reaches 31.0 % on val, −20.0 points (−22.3 to −17.7) against random real"),
        ([0.9], [0.1], "reaches 90.0 % on val, +80.0 points (no interval: too few generation seeds, or no spread) against random real"),
        ([0.9, 0.9], [0.1, 0.1], "reaches 90.0 % on val, +80.0 points (no interval: too few generation seeds, or no spread) against random real"),
    ],
    ids=["no difference shown", "a loss", "one seed", "no spread"],
)
def test_a_gain_that_is_not_shown_on_val_is_refused_with_its_numbers(tmp_path, shelf, ours, real, numbers):
    """The gain on test, which is clear, does not count."""
    made = judged(tmp_path, lines=pairs(ours, real))
    before = contents(tmp_path)
    with pytest.raises(GateError, match=rf"a set of 2 images per class {re.escape(numbers)}: .* --force or `publish\.gate: off`"):
        published(made, shelf)
    assert GateError.exit_code == 3
    assert shelf.releases == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("seeds", "fresh"), [((0, 1, 2), "[3, 4, 5]"), ((7,), "[8, 9, 10]"), ((0, 9, 2, 3), "[10, 11, 12, 13]")])
def test_a_refusal_asks_for_fresh_seeds_and_never_for_more_of_them(tmp_path, shelf, seeds, fresh):
    made = judged(tmp_path, more=0.0, seeds=seeds)
    with pytest.raises(GateError) as refusal:
        published(made, shelf)
    assert f"judge it by a fresh set of generation seeds in place of the old ones (`sample.seeds: {fresh}`)" in str(refusal.value)
    assert "more generation seeds" not in str(refusal.value)


def test_students_that_guess_are_told_first(tmp_path, shelf, caplog):
    made = judged(tmp_path, lines=lambda made: [*pairs([0.5, 0.52], [0.51, 0.49])(made), made.line("full", None, None, 0, 0.51)])
    caution = "convnet-2 lies within noise of chance (50.0 %) even on full data (51.0 %)"
    with pytest.raises(GateError, match=rf"^{re.escape(caution)}.* a set of 2 images per class reaches 51\.0 % on val"):
        published(made, shelf)
    published(made, shelf, force=True)
    assert caplog.messages[0].startswith(caution)
    card = (tmp_path / "card" / "card.md").read_text(encoding="utf-8")
    assert "## What it is worth\n\n**Caution.** convnet-2 lies within noise of chance" in card
    assert "a claim about the method needs several" in card


def test_the_interval_decides_not_the_mean(tmp_path, shelf):
    """Just below the edge and just above it."""
    ours, real = np.array([0.50, 0.54, 0.58]), [0.51, 0.54, 0.57]
    low, high = stats.ttest_ind(ours, real, equal_var=False).confidence_interval(0.95)
    below, above = (judged(tmp_path / f"{more:.3f}", lines=pairs([*(ours - low + more)], real)) for more in (-0.001, 0.001))
    with pytest.raises(GateError, match=rf"\+{100 * (-low - 0.001):.1f} points \(−0\.1 to \+{100 * (high - low - 0.001):.1f}\)"):
        published(below, shelf)
    assert published(above, shelf)["val_gain/ipc2"] == pytest.approx(0.001 - low, abs=1e-6)


def test_the_whole_set_must_gain(tmp_path, shelf):
    """A gain with fewer images per class, which `all_lines` has, is not that of the set."""
    made = judged(tmp_path, more=0.0)
    with pytest.raises(GateError, match="a set of 2 images per class reaches"):
        published(made, shelf)


@pytest.mark.parametrize(
    "lines",
    [
        lambda made: [one | {"accuracy_val": None} for one in all_lines(made.images.digest, BETTER)],
        lambda made: [one for one in all_lines(made.images.digest, BETTER) if one["source"] != "random"],
        lambda made: [one for one in all_lines(made.images.digest, BETTER) if one["images_per_class"] != 2],
    ],
    ids=["no val", "no baseline", "another size"],
)
def test_a_set_that_was_not_judged_on_val_is_refused(tmp_path, shelf, lines):
    made = judged(tmp_path, lines=lines)
    with pytest.raises(GateError, match="a set of 2 images per class was not judged on a val split beside real images of that number"):
        published(made, shelf)
    assert not (tmp_path / "card").exists()
    assert shelf.releases == []


@pytest.mark.parametrize(("config", "options"), [({}, {"force": True}), ({"gate": "off"}, {})])
def test_force_and_an_open_gate_let_any_set_pass(tmp_path, shelf, config, options):
    made = judged(tmp_path, lines=lambda made: [made.line("distilled", 2, 0, 0, 0.1, accuracy_val=None)])
    found = published(made, shelf, PublishConfig(**config), **options)
    assert found == {"version": 1.0, "images": 12.0, "bytes": float(shelf.releases[0].tags["bytes"])}
    assert "- Not judged on a val split." in (tmp_path / "card" / "card.md").read_text()


def test_a_refused_set_leaves_the_earlier_card(made, shelf, tmp_path):
    published(made, shelf)
    before = contents(tmp_path / "card")
    made.scores.clear()
    made.judge(all_lines(made.images.digest), "worse")
    made.summarise()
    with pytest.raises(GateError):
        published(made, shelf)
    assert contents(tmp_path / "card") == before


# --- what belongs together ----------------------------------------------------------------------------------------


def test_the_report_of_another_set_is_refused(made, shelf, tmp_path):
    other = judged(tmp_path / "other", draw=1)
    shutil.rmtree(tmp_path / "report")
    shutil.copytree(other.root / "report", tmp_path / "report")
    with pytest.raises(DiffstillError, match=r"report: reports on another distilled set than .*distilled; run `report` again"):
        published(made, shelf, force=True)
    assert not (tmp_path / "card").exists()
    assert shelf.releases == []


def test_a_damaged_image_is_never_published(made, shelf, tmp_path):
    path = next((tmp_path / "distilled" / "seed-2").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DiffstillError, match=f"{path.name}: content differs"):
        published(made, shelf)
    assert shelf.releases == []


def test_a_release_is_known_by_its_set_and_its_report(made, shelf):
    """Neither by its card nor by where it lies."""
    published(made, shelf)
    published(made, shelf, PublishConfig(note="Another card."), "again")
    made.summarise(config=ReportConfig(shown_per_class=3))
    published(made, shelf)
    first, again, later = shelf.releases
    assert first.artifacts["card"].digest != again.artifacts["card"].digest
    assert first.content == again.content != later.content
    assert first.lineage == Lineage.of(first.artifacts["distilled"], first.artifacts["report"])


def test_the_name_is_that_of_the_data_or_ones_own(made, shelf):
    published(made, shelf)
    published(made, shelf, PublishConfig(name="My digits v2"))
    assert [release.name for release in shelf.releases] == ["distilled-digits", "My digits v2"]


def test_images_of_a_folder_need_a_name(tmp_path, shelf):
    made = judged(tmp_path, data=PrepareConfig(source="folder", location="s3://bucket/raw"))
    with pytest.raises(DiffstillError, match=r"`publish\.name` is null, but images of a folder have no name of their own"):
        published(made, shelf)
    assert not (tmp_path / "card").exists()
    published(made, shelf, PublishConfig(name="distilled-flowers"))
    assert shelf.releases[0].name == "distilled-flowers"


# --- tags ---------------------------------------------------------------------------------------------------------


def test_tags_say_all_that_a_version_is_searched_by(tmp_path, shelf):
    location = "dvc+https://host/org/repo.git?rev=4b825dc642cb6eb9a060e54bf8d69288fbee4904&path=data&md5=d41d8cd98f00b204e9800998ecf8427e.dir"
    made = judged(tmp_path, data=PrepareConfig(source="folder", location=location), policy="fifo")
    metrics = published(made, shelf, PublishConfig(name="flowers", licence="CC BY 4.0"))
    (release,) = shelf.releases
    size = sum(path.stat().st_size for path in (tmp_path / "distilled").rglob("*") if path.is_file())
    digests = {name: artifact.digest for name, artifact in made.opened("images", "generator", "distilled").items()}
    tags = dict(release.tags)
    numbers = {size: json.loads(tags.pop(f"numbers/ipc{size}")) for size in (1, 2)}
    assert tags == {
        "dataset": "folder",
        "ipc": "2",
        "classes": "2",
        "resolution": "8x8",
        "seeds": "0, 1, 2",
        "guidance": "3",
        "sampler": "ddim, 25 steps",
        "memory_policy": "fifo",
        "generator": "scratch",
        "generator_sha256": digests["generator"],
        "protocol": "short-20",
        "students": STUDENT,
        "student_seeds": "0, 1",
        "images_sha256": digests["images"],
        "data_location": location,
        "data_revision": "4b825dc642cb6eb9a060e54bf8d69288fbee4904",
        "data_md5": "d41d8cd98f00b204e9800998ecf8427e.dir",
        "sha256": digests["distilled"],
        "report_sha256": open_artifact(tmp_path / "report", "report").digest,
        "bytes": str(size),
        "licence": "CC BY 4.0",
        "test/convnet-2/ipc1": "82.7 ± 2.3 % (6 runs)",
        "test/convnet-2/ipc2": "76.0 ± 3.1 % (6 runs)",
        "val/convnet-2/ipc1": "41.3 ± 1.2 % (6 runs)",
        "val/convnet-2/ipc2": "38.0 ± 1.6 % (6 runs)",
        "gain_over_random/convnet-2/ipc1": told(by_seed(DISTILLED[1], BETTER), by_seed(RANDOM[1])),
        "gain_over_random/convnet-2/ipc2": told(by_seed(DISTILLED[2], BETTER), by_seed(RANDOM[2])),
        "val_seeds/ipc1": "[0.408, 0.41, 0.422]",
        "val_seeds/ipc2": "[0.373, 0.385, 0.382]",
        "val_gain/ipc1": told(by_seed(DISTILLED[1], BETTER) / 2, by_seed(RANDOM[1]) / 2),
        "val_gain/ipc2": told(by_seed(DISTILLED[2], BETTER) / 2, by_seed(RANDOM[2]) / 2),
    }
    gains = {"val_gain/ipc1": 0.238333, "val_gain/ipc2": 0.105}
    for ipc, found in numbers.items():
        leaf = found["students"][STUDENT]
        assert (leaf["test_mean"], leaf["runs"]) == (pytest.approx({1: 0.827, 2: 0.760}[ipc], abs=6e-4), 6)
        low, high = stats.ttest_ind(by_seed(DISTILLED[ipc], BETTER) / 2, by_seed(RANDOM[ipc]) / 2, equal_var=False).confidence_interval(0.95)
        expected = [gains[f"val_gain/ipc{ipc}"], low, high]
        assert [found[f"val_gain{end}"] for end in ("", "_low", "_high")] == pytest.approx(expected, abs=1e-6)
    assert metrics == {"version": 1.0, "images": 12.0, "bytes": float(size)} | gains


def test_what_is_not_known_has_no_tag(made, shelf):
    published(made, shelf)
    assert not {"licence", "data_location", "data_revision", "data_md5"} & shelf.releases[0].tags.keys()
    assert all(shelf.releases[0].tags.values())


def test_what_file_browsers_leave_is_not_counted(made, shelf, tmp_path):
    published(made, shelf)
    (tmp_path / "distilled" / ".DS_Store").write_text("litter")
    published(made, shelf)
    first, again = shelf.releases
    assert first.tags == again.tags


# --- the card -----------------------------------------------------------------------------------------------------


def tokens_of(text: str) -> list:
    """Block and inline tokens in order."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        found += [token, *(token.children or [])]
        found += [inner for child in token.children or [] for inner in child.children or []]
    return found


def tables_of(text: str) -> list[list[list[str]]]:
    """Rows of cells of each table."""
    tables: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for number, token in enumerate(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            tables[-1][-1].append(tokens[number + 1].content)
    return tables


def test_equal_releases_have_equal_cards(made, shelf, tmp_path):
    published(made, shelf)
    published(made, shelf, card="elsewhere")
    copy = judged(tmp_path / "other")
    published(copy, shelf)
    cards = [release.artifacts["card"] for release in shelf.releases]
    assert len({card.digest for card in cards}) == 1
    assert contents(cards[0].folder) == contents(cards[2].folder)
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in cards[0].folder.rglob("*") if path.is_file())


def test_the_card_tells_what_the_set_is_worth(made, shelf, tmp_path):
    published(made, shelf, PublishConfig(licence="CC BY 4.0", note="Made for **tests**."))
    text = (tmp_path / "card" / "card.md").read_text(encoding="utf-8")
    assert text.startswith("# distilled-digits: 2 images per class\n\n4 synthetic images in 2 classes (8 × 8 pixels, grey) in place of 12 real")
    assert "3 sets: generation seeds 0, 1, 2." in text
    assert "\nMade for **tests**.\n" in text
    assert "- On val, 2 images per class: +10.5 points (+6.5 to +14.5) over random real: a gain.\n" in text
    assert "- Licence: CC BY 4.0.\n" in text
    results, traced = tables_of(text)
    assert results[0] == ["trained on", "convnet-2, IPC 1", "convnet-2, IPC 2"]
    assert [row[0] for row in results[1:]] == ["random real", "untuned generator", "distilled", "full data"]
    assert results[3][1:] == ["82.7 ± 2.3 % (6 runs)", "76.0 ± 3.1 % (6 runs)"]
    assert results[4][1] == results[4][2] == "92.0 ± 2.8 % (2 runs)"
    assert traced[0] == ["artifact", "sha256", "made from"]
    assert ["distilled", f"`{made.opened('distilled')['distilled'].digest}`", "denoiser, generator"] in traced


def test_the_card_warns_of_terms_of_the_weights_and_of_leakage(tmp_path, shelf):
    made = judged(tmp_path, weights_licence="CC-BY-NC-4.0: no commercial use", leakage="3 of 6 test images were seen")
    published(made, shelf)
    text = (tmp_path / "card" / "card.md").read_text(encoding="utf-8")
    assert "- Licence of the pretrained weights: CC-BY-NC-4.0: no commercial use.\n- 3 of 6 test images were seen\n\n## Lineage" in text
    assert shelf.releases[0].tags["weights_licence"] == "CC-BY-NC-4.0: no commercial use"


def test_what_was_not_run_stands_as_a_dash(tmp_path, shelf):
    made = judged(tmp_path, lines=lambda made: [made.line("distilled", 2, 0, 0, 0.5), made.line("random", 1, 0, 0, 0.5)])
    published(made, shelf, force=True)
    results = tables_of((tmp_path / "card" / "card.md").read_text())[0]
    assert results[1:] == [["random real", "50.0 % (1 run)", "-"], ["distilled", "-", "50.0 % (1 run)"]]


def test_the_card_is_right_markdown_whatever_classes_are_called(tmp_path, shelf):
    made = judged(tmp_path, classes=HOSTILE)
    published(made, shelf)
    text = (tmp_path / "card" / "card.md").read_text(encoding="utf-8")
    tokens = tokens_of(text)
    for table in tables_of(text):
        assert len({len(row) for row in table}) == 1, table
    assert len(tables_of(text)) == 2
    assert not [token for token in tokens if token.type.startswith("html") or token.type == "link_open"]
    headings = [tokens[number + 1].content for number, token in enumerate(tokens) if token.type == "heading_open" and token.tag == "h2"]
    assert headings == ["What it is worth", "Load it", "How it was made", "Limits", "Lineage"]
    images = [token for token in tokens if token.type == "image"]
    assert ["".join(child.content for child in image.children) for image in images] == list(HOSTILE)
    for name, image in zip(HOSTILE, images, strict=True):
        shown = tmp_path / "card" / unquote(image.attrs["src"])
        with Image.open(shown) as sheet:
            expected = read_png(tmp_path / "distilled" / "seed-0" / name / "00000.png")[0]
            np.testing.assert_array_equal(np.asarray(sheet)[2:50:6, 2:50:6], expected)
    assert len({image.attrs["src"] for image in images}) == len(HOSTILE)


def test_sheets_are_called_like_their_classes_where_files_and_urls_allow_it(tmp_path, shelf):
    names = ("cat", "Border collie", "ünï.1", "a#b", "_1", "long " * 49, ".hidden", "n01440764")
    published(judged(tmp_path, classes=names), shelf)
    files = {path.name for path in (tmp_path / "card" / "sheets").iterdir()}
    assert files == {"cat.png", "Border collie.png", "ünï.1.png", "_3.png", "_4.png", "_5.png", "_6.png", "n01440764.png"}


def test_odd_locations_break_no_table(tmp_path, shelf):
    made = judged(tmp_path, data=PrepareConfig(source="folder", location="my|data/with_under_scores/`tick`/*"))
    published(made, shelf, PublishConfig(name="odd"))
    text = (tmp_path / "card" / "card.md").read_text(encoding="utf-8")
    traced = tables_of(text)[1]
    assert {len(row) for row in traced} == {3}
    assert "with_under_scores" in traced[1][1]
    told = [token.content for token in tokens_of(text) if token.type == "text" and "Raw data" in token.content]
    assert told == ["Raw data: my|data/with_under_scores/`tick`/*."]


def test_the_code_in_the_card_is_code(made, shelf, tmp_path):
    published(made, shelf)
    (fence,) = [token for token in tokens_of((tmp_path / "card" / "card.md").read_text()) if token.type == "fence"]
    compile(fence.content, "card.md", "exec")
    assert fence.info == "python"
    assert fence.content.count('diffstill.load("distilled-digits@newest"') == 2
    assert "ipc=1)" in fence.content


def test_the_lineage_lies_beside_the_card(made, shelf, tmp_path):
    published(made, shelf)
    told = json.loads((tmp_path / "card" / "lineage.json").read_text())
    assert told == json.loads(json.dumps(shelf.releases[0].lineage.plain()))
    assert [one.name for one in Lineage.of(open_artifact(tmp_path / "card", "card")).artifacts][-1] == "card"


@pytest.mark.parametrize(("channels", "per_class"), [(1, 2), (3, 12)])
def test_sheets_hold_the_pixels_of_the_set(tmp_path, shelf, channels, per_class):
    """Of the first generation seed, ten in a row, each pixel a square of six, a white border of two around each image."""
    made = judged(tmp_path, channels=channels, per_class=per_class, seeds=(3, 1))
    published(made, shelf, force=True)
    for label, name in enumerate(made.images.facts["classes"]):
        with Image.open(tmp_path / "card" / "sheets" / f"_{label}.png") as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            sheet = np.atleast_3d(np.asarray(image))
        rows, columns = -(-per_class // 10), min(per_class, 10)
        assert sheet.shape == (52 * rows, 52 * columns, channels)
        expected = np.full_like(sheet, 255)
        for number in range(per_class):
            top, left = 52 * (number // 10) + 2, 52 * (number % 10) + 2
            pixels = read_png(tmp_path / "distilled" / "seed-3" / name / f"{number:05d}.png").transpose(1, 2, 0)
            expected[top : top + 48, left : left + 48] = np.kron(pixels, np.ones((6, 6, 1), np.uint8))
        np.testing.assert_array_equal(sheet, expected)


def test_a_large_set_is_shown_by_its_first_hundred(tmp_path, shelf):
    made = judged(tmp_path, classes=("a",), per_class=101, seeds=(0,))
    published(made, shelf, force=True)
    with Image.open(tmp_path / "card" / "sheets" / "a.png") as image:
        assert image.size == (520, 520)


def test_the_card_is_an_artifact_of_its_own(made, shelf, tmp_path):
    published(made, shelf, PublishConfig(note="n"))
    card = open_artifact(tmp_path / "card", "card")
    assert card.manifest.config["note"] == "n"
    assert card.manifest.inputs == {"distilled": shelf.releases[0].tags["sha256"], "report": shelf.releases[0].tags["report_sha256"]}
    assert shelf.releases[0].artifacts["card"] == card
    assert (tmp_path / "card" / MANIFEST).is_file()

"""The table at the end of a chain."""

import csv
import shutil

import pytest

from chains import contents
from diffstill.errors import DiffstillError
from diffstill.summary import markdown, print_summary
from experiments import make_experiment


def test_the_table_shows_the_numbers_of_the_report(tiny_chain, capsys):
    print_summary(tiny_chain.artifacts)
    shown = capsys.readouterr().out
    with (tiny_chain.artifacts / "report" / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} == {"random", "untuned", "distilled", "full"}
    for row in rows:
        spread = f" ± {100 * float(row['sd']):.1f}" if row["sd"] else ""
        assert f"{100 * float(row['mean']):.1f}{spread} ({row['runs']})" in shown
    assert f"{tiny_chain.artifacts}/report/report.html" in shown
    assert f"{tiny_chain.artifacts}/distilled/seed-0" in shown
    assert "MLflow" not in shown


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("sqlite:///here/mlflow.db", "mlflow ui --backend-store-uri sqlite:///here/mlflow.db"),
        ("https://user:s3cr3t@mlflow.example/?token=s3cr3t", "MLflow     https://***@mlflow.example/?***"),
    ],
)
def test_where_runs_are_told_without_credentials(uri, hint, tiny_chain, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    print_summary(tiny_chain.artifacts)
    shown = capsys.readouterr().out
    assert hint in shown
    assert "s3cr3t" not in shown


def test_brackets_in_a_path_are_printed(tiny_chain, tmp_path, capsys):
    shutil.copytree(tiny_chain.artifacts, tmp_path / "run [red]")
    print_summary(tmp_path / "run [red]")
    assert "run [red]/report/report.html" in capsys.readouterr().out


def test_students_that_guess_are_told_before_the_table(tmp_path, capsys):
    made = make_experiment(tmp_path)
    made.judge([made.line("distilled", 1, seed, 0, 0.5 + seed / 100) for seed in (0, 1)] + [made.line("full", None, None, 0, 0.51)])
    report = made.summarise()
    print_summary(tmp_path)
    caution, shown = "convnet-2 lies within noise of chance (50.0 %) even on full data (51.0 %)", capsys.readouterr().out
    assert shown.startswith(f"caution: {caution}")
    assert "a claim about the method needs several (`finetune.seeds`)" in shown
    assert markdown(report).startswith(f"**Caution.** {caution}")
    assert "a claim about the method needs several" in markdown(report)


def test_a_damaged_report_is_refused(tiny_chain, tmp_path):
    shutil.copytree(tiny_chain.artifacts, tmp_path / "artifacts")
    with (tmp_path / "artifacts" / "report" / "accuracy.csv").open("a") as file:
        file.write("better,1.0\n")
    before = contents(tmp_path)
    with pytest.raises(DiffstillError, match=r"accuracy.csv: content differs"):
        print_summary(tmp_path / "artifacts")
    assert contents(tmp_path) == before

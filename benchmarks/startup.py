"""CPU seconds that commands take before they have anything to do: the median of some calls, of this checkout and of another one by turns.

python benchmarks/startup.py [--against <src folder of another checkout>]
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

HERE = Path(__file__).parents[1] / "src"
COMMANDS = {
    "--help": ["--help"],
    "--version": ["--version"],
    "show": ["show"],
    "preset": ["preset", "tiny", "--output", "again.yaml", "--force"],
    "second run": ["run"],
    "list": ["list"],
}


def cpu_seconds(source: Path, arguments: list[str], folder: Path) -> float:
    """User and system time of one call."""
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "DIFFSTILL_WORK": str(folder / "work"),
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "diffstill", *arguments], cwd=folder, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@click.command()
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="src folder of the code to compare with.")
@click.option("--repeats", default=5, show_default=True)
def main(against: Path | None, repeats: int) -> None:
    sources = {"now": HERE} | ({"before": against.resolve()} if against else {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for arguments in (["preset", "tiny"], ["-q", "run"]):
            cpu_seconds(HERE, arguments, folder)
        for name, arguments in COMMANDS.items():
            times: dict[str, list[float]] = {source: [] for source in sources}
            for _ in range(repeats):
                for source, path in sources.items():
                    times[source].append(cpu_seconds(path, arguments, folder))
            told = "   ".join(f"{source} {statistics.median(own):.2f} s ({min(own):.2f} to {max(own):.2f})" for source, own in times.items())
            click.echo(f"{name:12} {told}")


if __name__ == "__main__":
    main()

"""Upload a folder by `storage.upload` and by a plain loop over boto3's `upload_file`: `python benchmarks/upload.py [--files 1000 --kib 16]`.

Shows what sending ten files at a time gains over one after the other, and what listing, checksums and verification cost:
`upload` compares every object with its file, the loop nothing. Both send the same bytes to the same server on this machine, by
turns, each time below a new prefix; clients are made before or within as each way does. The server is moto, in Python and in
memory, so both ways mostly wait for it: the ratio is worth something, the throughputs say little of another store.
`--endpoint` measures a store that is there instead, with credentials from the environment.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from tqdm import tqdm

from diffstill import storage

MIB = 2**20


def random_folder(folder: Path, files: int, size: int) -> Path:
    """`files` files of `size` random bytes, and a manifest."""
    folder.mkdir()
    for number in range(files):
        (folder / f"{number:05d}.bin").write_bytes(os.urandom(size))
    (folder / "manifest.json").write_text("{}")
    return folder


def by_loop(folder: Path, uri: str) -> None:
    """As a script does it."""
    bucket, prefix = uri.removeprefix("s3://").split("/")
    client = boto3.Session().client("s3")
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")


def mib_per_second(upload: Callable[[Path, str], object], folder: Path, bucket: str) -> float:
    """Throughput of one upload below a new prefix, which is emptied afterwards."""
    prefix, size = uuid.uuid4().hex, sum(path.stat().st_size for path in folder.iterdir())
    start = time.perf_counter()
    upload(folder, f"s3://{bucket}/{prefix}")
    seconds = time.perf_counter() - start
    client = boto3.Session().client("s3")
    for path in folder.iterdir():
        client.delete_object(Bucket=bucket, Key=f"{prefix}/{path.name}")
    return size / MIB / seconds


def compare(title: str, folder: Path, bucket: str, repeats: int) -> None:
    """Print median and spread of both ways and of their ratio, turn by turn."""
    turns = [
        (mib_per_second(by_loop, folder, bucket), mib_per_second(storage.upload, folder, bucket))
        for _ in tqdm(range(repeats), title, leave=False, disable=None)
    ]
    loop, upload = zip(*turns, strict=True)
    print(f"{title}, {repeats} turns")
    print(f"  upload_file loop  {spread(loop)} MiB/s")
    print(f"  storage.upload    {spread(upload)} MiB/s")
    print(f"  ratio             {spread([ours / plain for plain, ours in turns])}")


def spread(values: list[float] | tuple[float, ...]) -> str:
    """Median (least to greatest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def listens(port: int) -> bool:
    """Whether a server has started."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def moto(folder: Path) -> Iterator[str]:
    """The URL of an S3 server of one's own, gone when the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "moto.log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    try:
        while server.poll() is None and not listens(port):
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Many small files, then a few large ones."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"files": 1000, "kib": 16, "large-files": 4, "large-mib": 32, "repeats": 5}.items():
        options.add_argument(f"--{name}", type=int, default=default, help=f"{default} by default")
    options.add_argument("--endpoint", help="a store that is there, by default one that is started")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        small = random_folder(Path(scratch) / "small", given.files, given.kib * 1024)
        large = random_folder(Path(scratch) / "large", given.large_files, given.large_mib * MIB)
        if given.endpoint:
            measure(given, given.endpoint, small, large)
        else:
            with moto(Path(scratch)) as endpoint:
                measure(given, endpoint, small, large)


def measure(given: argparse.Namespace, endpoint: str, small: Path, large: Path) -> None:
    """Both folders, in a bucket of their own."""
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    bucket = f"benchmark-{uuid.uuid4().hex[:12]}"
    client = boto3.Session().client("s3")
    client.create_bucket(Bucket=bucket)
    compare(f"{given.files} files of {given.kib} KiB", small, bucket, given.repeats)
    compare(f"{given.large_files} files of {given.large_mib} MiB", large, bucket, given.repeats)
    client.delete_bucket(Bucket=bucket)


if __name__ == "__main__":
    main()

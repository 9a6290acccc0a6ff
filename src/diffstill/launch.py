"""A stage in several processes, on one machine or as one machine's share of many: torch's elastic launcher, and what it starts.

`python -m diffstill.launch WORK`, with a `Work` as JSON, is one rank where the launcher has started it, and else the
launcher of one node among several, which its environment (`PET_*`, as Kubeflow Trainer sets it) tells of the others.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from diffstill.commands import mend_streams
from diffstill.config import Params, read_json
from diffstill.errors import DiffstillError, TransientError
from diffstill.run import resolve_device, run_stage

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

log = logging.getLogger("diffstill")
GRACE = 20
"""Seconds that ranks have to end by themselves; a pod has 30 before it is killed."""
TERMINATION_LOG = Path("/dev/termination-log")
"""Where a container of Kubernetes leaves its last words, which Argo tells of the attempt."""
REFUSAL = "diffstill refuses"
"""By this a policy of retries knows what is final: Kubeflow's launcher makes 1 of every exit code."""
ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Work(BaseModel):
    """A stage with its section of the parameters as JSON, and its artifacts: folders that all ranks see, or `s3://` prefixes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    config: str
    paths: Mapping[str, str]
    step: str
    result: str | None = None
    """File for what the main rank has measured."""

    def perform(self) -> dict[str, float]:
        """Run the stage in this process; returns its metrics."""
        section = read_json(self.config, type(Params.model_fields[self.stage].default))
        paths = {name: place if "://" in place else Path(place) for name, place in self.paths.items()}
        return run_stage(self.stage, section, paths, step=self.step, device=device_here())


def device_here() -> str:
    """The device that `DIFFSTILL_DEVICE` names, by default cuda where there is one, checked."""
    return resolve_device(os.environ.get("DIFFSTILL_DEVICE") or "auto")


def ranks_here() -> int:
    """How many processes share a stage on this machine: `DIFFSTILL_RANKS`, or one per GPU unless one device is named."""
    asked = os.environ.get("DIFFSTILL_RANKS")
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise DiffstillError(f"DIFFSTILL_RANKS is {asked!r}, not a number of processes; set it to 1 or more, or unset it for one per GPU")
        return int(asked)
    if device_here() != "cuda":
        return 1
    import torch

    return torch.cuda.device_count()


def launch(work: Work, ranks: int) -> dict[str, float]:
    """Do `work` in so many processes of this machine; returns what the main rank has measured.

    Raises `DiffstillError` with what a rank refuses, `TransientError` if one is killed, `RuntimeError` with the traceback of a bug.
    A signal that ends this process ends them first, with exit code 128 + its number.
    """
    log.info("%s in %d processes ...", work.step, ranks)
    alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}", "--local-addr=localhost", "--nnodes=1"]
    with TemporaryDirectory(prefix="diffstill-ranks-") as folder:
        result = Path(folder) / "result.json"
        _supervise([*alone, f"--nproc-per-node={ranks}"], work.model_copy(update={"result": str(result)}), folder)
        measured: dict[str, float] = json.loads(result.read_text())
        return measured


def _supervise(arguments: Sequence[str], work: Work, folder: str) -> None:
    """Start the ranks of this machine and stay until all have ended; what they say of errors goes to files in `folder`."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    common = ["--max-restarts=0", f"--shutdown-timeout={GRACE}", f"--log-dir={folder}", "--module", "diffstill.launch", work.model_dump_json()]
    with _quiet(), _signals_as_before():
        config, command, rest = config_from_args(parse_args([*arguments, *common]))
        try:
            elastic_launch(config, command)(*rest)
        except SignalException as stopped:
            raise SystemExit(128 + stopped.sigval) from None
        except ChildFailedError as failed:
            raise _cause(failed) from None


def _cause(failed: ChildFailedError) -> Exception:
    """What went wrong first: an error of ours, else a kill, else a bug. The others fail because they have lost a peer, or are ended by the launcher."""
    began = min(failure.timestamp for failure in failed.failures.values())
    rank, first = min(failed.failures.items(), key=lambda item: (_order(item[1], began), item[1].timestamp, item[0]))
    if _says_why(first):
        kind = TransientError if first.exitcode == TransientError.exit_code else DiffstillError
        return kind(_told(first)["message"].partition(": ")[2])
    if first.exitcode < 0:
        advice = "if it ran out of memory, give the task more, or take a smaller `finetune.batch_size`"
        return TransientError(f"rank {rank} was killed by {first.signal_name()}; {advice}")
    return RuntimeError(f"rank {rank} ended with exit code {first.exitcode}:\n{_told(first)['traceback']}")


def _order(failure: ProcessFailure, began: int) -> int:
    """Which failure to look at first. A kill is noticed later than what it does to others, but that by the launcher, of ranks that do not end, much later."""
    if _says_why(failure):
        return 0
    by_launcher = failure.exitcode == -signal.SIGTERM or (failure.exitcode < 0 and failure.timestamp >= began + GRACE)
    return 3 if by_launcher else 1 if failure.exitcode < 0 else 2


def _says_why(failure: ProcessFailure) -> bool:
    """Whether it is an error of ours, and no bug."""
    return failure.exitcode in (DiffstillError.exit_code, TransientError.exit_code) and isinstance(failure.message, dict)


def _told(failure: ProcessFailure) -> dict[str, str]:
    """What a rank has written of its error, as torch's handler does."""
    said: Any = failure.message
    if not isinstance(said, dict):
        return {"message": said, "traceback": said}
    return {"message": said["message"], "traceback": said["extraInfo"]["py_callstack"]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Let torch's launcher say nothing: each of its modules sets a level of its own, and what matters becomes our message."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(("torch.distributed", "torch.numa"))]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextmanager
def _signals_as_before() -> Iterator[None]:
    """The launcher takes over the signals that end a process, and does not give them back."""
    before = {number: signal.getsignal(number) for number in ENDS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def one_message() -> Iterator[None]:
    """Progress to standard error; a user's error is one message and its exit code, a bug keeps its traceback.

    What may succeed when it is tried again leaves no last words.
    """
    mend_streams()
    log_progress()
    try:
        yield
    except DiffstillError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if not isinstance(error, TransientError) and TERMINATION_LOG.is_file():  # in a pod, and nowhere else
            TERMINATION_LOG.write_text(f"{REFUSAL} (exit code {error.exit_code}): {error}"[:1000], encoding="utf-8")
        raise SystemExit(error.exit_code) from error


def log_progress() -> None:
    """Our own messages to standard error, those of libraries from warnings on."""
    logging.basicConfig(format="diffstill: %(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
    logging.getLogger("diffstill").setLevel(logging.INFO)


def main(text: str) -> None:
    """Be a rank, or the launcher of a node."""
    work = Work.model_validate_json(text)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _be_rank(work)
    else:
        with one_message(), TemporaryDirectory(prefix="diffstill-ranks-") as folder:
            _supervise([], work, folder)


def _be_rank(work: Work) -> None:
    """Do the work; an error goes to the file where the launcher looks for it, and nowhere else."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    log_progress()
    if os.environ["RANK"] != "0":
        log.setLevel(logging.WARNING)
    handler = get_error_handler()
    handler.initialize()
    try:
        measured = work.perform()
        if work.result and os.environ["RANK"] == "0":
            Path(work.result).write_text(json.dumps(measured), encoding="utf-8")
    except Exception as error:
        handler.record_exception(error)
        sys.exit(error.exit_code if isinstance(error, DiffstillError) else 1)


if __name__ == "__main__":
    main(sys.argv[1])

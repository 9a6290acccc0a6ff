"""Every command of the cluster's pages, run up to the first call that needs a cluster: objects are rendered and validated in place of being sent."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from diffstill.cli import main as diffstill
from manifests import CLUSTER, ROOT, kubectl, name, refused, rendered
from pipelines.__main__ import main as pipelines
from policies import by_kind, complaints

FRONT = ROOT / "README.md"
README = ROOT / "infra" / "kubernetes" / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
ELSEWHERE = (
    "git clone <this repository> diffstill && cd diffstill",
    "kind create cluster --name diffstill",
    "kind load docker-image --name diffstill diffstill:cpu diffstill:mlflow",
    'kubectl apply -k "github.com/kubeflow/pipelines/manifests/kustomize/cluster-scoped-resources?ref=2.17.0"',
    'kubectl apply -k "github.com/kubeflow/pipelines/manifests/kustomize/env/platform-agnostic?ref=2.17.0"',
)
"""Commands that are nothing but a call to Docker, kind or the network: not run."""
ASKING = ("wait", "rollout", "get", "port-forward", "scale", "diff", "exec")
"""Of kubectl, that talk to a cluster and send no object of ours; `diff` renders a folder first."""


def blocks(text, language):
    return [block for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if kind == language]


def section(heading, page=OPERATIONS):
    """A part of a page; of docs/operations.md, if no other is named."""
    return page.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def commands(text):
    """Lines of the blocks without a language."""
    return [line for block in blocks(text, "") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


PAGES = {
    "front page": section("On a Kubernetes cluster", FRONT).partition("\nThe same pipeline runs without a cluster")[0],
    "README": README.read_text(),
    "A cluster": section("A cluster"),
    "Upgrade": section("Upgrade"),
    "Rotate credentials": section("Rotate credentials").partition("**On a cluster**")[2],
}
PUSHED = re.compile(r"^kubectl (?:apply|diff) -k (infra/kubernetes/\S+)", re.MULTILINE)
"""Folders of ours that a page sends."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a clone has of what the commands touch, with the overlay that the README writes down."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "infra" / "kubernetes", folder / "infra" / "kubernetes", ignore=shutil.ignore_patterns("*.env", "mine"))
    for part in ("Makefile", "params.yaml", "docker", "src", "constraints.txt", "pyproject.toml"):
        (folder / part).symlink_to(ROOT / part)
    for text in blocks(README.read_text(), "yaml"):
        path = folder / text.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return folder


def ran(checkout, *words, **options):
    done = subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    return done.stdout


def sent(checkout, folder):
    """What `kubectl apply -k` would send, valid and as our policies want it."""
    objects = list(yaml.safe_load_all(ran(checkout, kubectl(), "kustomize", folder)))
    assert [error for thing in objects for error in refused(thing)] == []
    if by_kind(objects, "Namespace"):
        assert complaints([*objects, *(thing for part in CLUSTER for thing in rendered(part))]) == []
    return objects


def made(checkout, words):
    """What `kubectl create` would send, or prints for the `kubectl apply` behind it."""
    create, _bar, apply = shlex.join(words).partition(" '|' ")
    assert apply in ("", "kubectl apply -f -"), apply
    (thing,) = list(yaml.safe_load_all(ran(checkout, kubectl(), *shlex.split(create)[1:], "--dry-run=client", "--output=yaml")))
    del thing["metadata"]["creationTimestamp"]  # null, as kubectl prints it
    assert refused(thing) == []
    return [thing]


def invoked(checkout, monkeypatch, command, words):
    monkeypatch.chdir(checkout)
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def perform(line, checkout, monkeypatch, tmp_path):
    """Run a command as far as it goes here; one that nobody thought of fails."""
    words = shlex.split(line.removesuffix("&").replace("/tmp/", f"{tmp_path}/"), comments=True)
    match [word for word in words if not word.startswith("-") and word not in ("kubeflow", "diffstill")] or words:
        case _ if line in ELSEWHERE or line == ". .venv/bin/activate":
            pass
        case ["make", *_]:
            assert ran(checkout, "make", "--dry-run", *words[1:])
        case ["cp" | "mkdir", *_]:
            ran(checkout, *words)
        case ["kubectl", "apply", folder]:
            assert sent(checkout, folder)
        case ["kubectl", "create", *_]:
            assert made(checkout, words)
        case ["kubectl", "delete", "job", job]:
            assert ("Job", job) in {(thing["kind"], thing["metadata"]["name"]) for thing in sent(checkout, "infra/kubernetes/overlays/kind")}
        case ["kubectl", "patch", "configmap", "workflow-controller-configmap", patch]:
            stock = tmp_path / "stock.yaml"
            stock.write_text("kind: ConfigMap\napiVersion: v1\nmetadata: {name: workflow-controller-configmap}\ndata: {artifactRepository: kept}\n")
            patched = yaml.safe_load(ran(checkout, kubectl(), "patch", "--local", "-f", str(stock), "--patch-file", patch, "--output=yaml"))
            assert set(patched["data"]) == {"artifactRepository", "workflowDefaults"}
        case ["kubectl", verb, *_] if verb in ASKING:
            ran(checkout, kubectl(), verb, "--help")
            if verb == "diff":
                assert sent(checkout, words[-1])
        case ["preset", *_] if words[0] == "diffstill":
            invoked(checkout, monkeypatch, diffstill, words[1:])
        case ["python", "pipelines", "submit", *_]:
            flags = [word for word in words[4:] if word != "--follow"]
            told = invoked(checkout, monkeypatch, pipelines, ["submit", *flags, "--dry-run", "--allow-dirty", "--allow-tag"])
            assert '"version"' in told
        case _:
            pytest.fail(f"no test knows the command: {line}")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_goes_as_far_as_it_can(page, checkout, monkeypatch, tmp_path):
    lines = commands(PAGES[page])
    assert len(lines) > 5
    if page == "Rotate credentials":  # whose secrets have been made before
        lines = [line for line in commands(PAGES["A cluster"]) if line.startswith("cp ")] + lines
    for line in lines:
        perform(line, checkout, monkeypatch, tmp_path)


def test_the_pages_send_all_that_a_run_needs():
    lines = commands(PAGES["README"])
    for folder in ("overlays/kind", "overlays/standalone", "overlays/mine", "secrets"):
        assert f"kubectl apply -k infra/kubernetes/{folder}" in lines
    assert [line for line in lines if "pipelines submit" in line and "overlays/kind/settings.yaml" in line]
    assert set(ELSEWHERE) <= {*lines, *commands(PAGES["front page"])}


def test_no_page_sends_an_image_of_ours_without_a_registry(checkout):
    """A cluster would look for it at Docker Hub; only kind is given images by hand."""
    pages = (FRONT, README, OPERATIONS, ROOT / "docs" / "kubeflow.md")
    folders = {folder for page in pages for folder in PUSHED.findall(page.read_text())} - {
        "infra/kubernetes/secrets",
        "infra/kubernetes/external-secrets",
    }
    assert {"infra/kubernetes/overlays/kind", "infra/kubernetes/overlays/mine", "infra/kubernetes/cluster"} <= folders
    bare = {folder for folder in folders if re.search(r"image: diffstill\b", ran(checkout, kubectl(), "kustomize", folder))}
    in_runtime = "infra/kubernetes/cluster/multinode"  # whose image each TrainJob replaces
    assert bare == {"infra/kubernetes/overlays/kind", in_runtime}
    for page in (PAGES["front page"], PAGES["A cluster"], PAGES["Upgrade"]):
        assert set(PUSHED.findall(page)) - {"infra/kubernetes/secrets", "infra/kubernetes/cluster"} == {"infra/kubernetes/overlays/mine"}


def test_rotated_keys_reach_every_secret_with_them():
    made = [line for line in commands(PAGES["README"]) if " create secret " in line]
    again = [line for line in commands(PAGES["Rotate credentials"]) if " create secret " in line]
    assert len(made) == 1
    assert [line.partition(" --dry-run=client -o yaml | kubectl apply -f -")[0] for line in again] == made


def test_a_second_team_stands_on_the_overlay_of_the_first(checkout):
    objects = sent(checkout, "infra/kubernetes/overlays/team-b")
    assert {thing["metadata"].get("namespace", "team-b") for thing in objects} == {"team-b"}
    assert by_kind(objects, "Namespace")[0]["metadata"]["name"] == "team-b"


def test_an_overlay_of_ones_own_names_images_by_digest(checkout):
    objects = sent(checkout, "infra/kubernetes/overlays/mine")
    (server,) = by_kind(objects, "Deployment")
    images = {each["image"] for kind in ("containers", "initContainers") for each in server["spec"]["template"]["spec"][kind]}
    assert images == {"registry.example/me/diffstill@sha256:" + "0" * 64}
    services = next(thing for thing in objects if name(thing) == "ConfigMap/diffstill-services")
    assert services["data"]["s3-endpoint"] == "https://s3.example.internal"
    assert "LocalQueue" in {thing["kind"] for thing in objects}


@pytest.mark.parametrize(
    "line", ["kubectl delete namespace diffstill", "kubectl delete pod buckets", "helm install kueue", "kubectl annotate pod x y=z"]
)
def test_a_command_that_nobody_thought_of_fails(line, checkout, monkeypatch, tmp_path):
    with pytest.raises(pytest.fail.Exception, match="no test knows the command"):
        perform(line, checkout, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "kubectl apply -k infra/kubernetes/overlays/none",
        "kubectl -n kubeflow create secret generic diffstill-s3 --from-env-file=none.env",
        "kubectl delete job none",
    ],
)
def test_a_command_that_cannot_work_fails(line, checkout, monkeypatch, tmp_path):
    with pytest.raises(AssertionError):
        perform(line, checkout, monkeypatch, tmp_path)


def test_links_lead_somewhere():
    for page in (README, OPERATIONS):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (Path(page.parent) / target).exists(), f"{page.name}: {target}"

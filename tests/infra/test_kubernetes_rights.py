"""What the service account of a run may do is what the code does: no more, no less.

That `diffstill.trainjob.RIGHTS` are the calls really made is shown in tests/test_trainjob.py, against a server that notes every request.
"""

import pytest

from diffstill.trainjob import RIGHTS
from manifests import KUBERNETES, placed
from pipelines.settings import load_settings
from policies import by_kind

ACCOUNT = {"kind": "ServiceAccount", "name": "diffstill-pipeline", "namespace": "diffstill"}
KUBEFLOW = {
    ("", "configmaps", "get", "kfp-launcher"),
    ("", "secrets", "get", "mlpipeline-minio-artifact"),
    ("", "secrets", "get", "diffstill-s3"),
    ("argoproj.io", "workflowtaskresults", "create", None),
    ("argoproj.io", "workflowtaskresults", "patch", None),
}
"""What Kubeflow Pipelines 2.17 and Argo's executor do: sources stand in base/runs/account.yaml."""


def granted(objects, account=ACCOUNT):
    """By role: group, resource, verb and name (None: any) of what an account may do."""
    found = {}
    for binding in (*by_kind(objects, "RoleBinding"), *by_kind(objects, "ClusterRoleBinding")):
        if account["name"] in {subject["name"] for subject in binding["subjects"]}:
            assert binding["subjects"] == [account], "nobody else has them"
            kind, name = binding["roleRef"]["kind"], binding["roleRef"]["name"]
            (role,) = [one for one in by_kind(objects, kind) if one["metadata"]["name"] == name]
            found[kind, name] = {
                (group, resource, verb, one)
                for rule in role["rules"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
                for verb in rule["verbs"]
                for one in rule.get("resourceNames", [None])
            }
    return found


def test_the_launcher_of_a_trainjob_may_do_what_it_does():
    roles = granted(placed(KUBERNETES / "base"))
    given = roles["Role", "diffstill-trainjob"] | roles["ClusterRole", "diffstill-trainjob"]
    assert {(group, resource, verb) for group, resource, verb, _name in given} == {
        (right.group, right.resource, verb) for right in RIGHTS for verb in right.verbs
    }


def test_rights_in_the_whole_cluster_are_to_read_two_runtimes():
    (cluster,) = [rights for (kind, _name), rights in granted(placed(KUBERNETES / "base")).items() if kind == "ClusterRole"]
    runtimes = {"diffstill-torch", "torch-distributed"}
    assert cluster == {("trainer.kubeflow.org", "clustertrainingruntimes", "get", name) for name in runtimes}
    infra = load_settings(KUBERNETES / "overlays" / "multinode" / "settings.yaml").infra
    assert infra.trainjob.runtime in runtimes


@pytest.mark.parametrize("overlay", ["kind", "gpu", "kueue", "multinode"])
def test_pods_of_a_run_may_do_what_kubeflow_does_there(overlay):
    roles = granted(placed(KUBERNETES / "overlays" / overlay))
    assert roles["Role", "diffstill-pipeline"] == KUBEFLOW
    assert set(roles) == {("Role", "diffstill-pipeline"), ("Role", "diffstill-trainjob"), ("ClusterRole", "diffstill-trainjob")}


def test_with_a_role_of_amazon_no_secret_is_read():
    roles = granted(placed(KUBERNETES / "overlays" / "aws"))
    assert roles["Role", "diffstill-pipeline"] == {right for right in KUBEFLOW if right[1] != "secrets"}


def test_where_runs_are_in_kubeflows_namespace_they_may_do_no_more():
    roles = granted(placed(KUBERNETES / "overlays" / "standalone"), ACCOUNT | {"namespace": "kubeflow"})
    assert roles == {("Role", "diffstill-pipeline"): KUBEFLOW}


@pytest.mark.parametrize("account", ["mlflow", "postgres", "s3", "buckets"])
def test_services_may_do_nothing(account):
    objects = placed(KUBERNETES / "overlays" / "kind")
    assert account in {one["metadata"]["name"] for one in by_kind(objects, "ServiceAccount")}
    assert granted(objects, ACCOUNT | {"name": account}) == {}


def test_a_right_too_many_is_seen():
    objects = placed(KUBERNETES / "base")
    (role,) = [one for one in by_kind(objects, "Role") if one["metadata"]["name"] == "diffstill-trainjob"]
    role["rules"][0]["verbs"].append("update")
    assert ("trainer.kubeflow.org", "trainjobs", "update", None) in granted(objects)["Role", "diffstill-trainjob"]


@pytest.mark.parametrize("group", ["system:authenticated", "system:unauthenticated"])
def test_a_subject_too_many_is_seen(group):
    objects = placed(KUBERNETES / "base")
    by_kind(objects, "ClusterRoleBinding")[0]["subjects"].append({"kind": "Group", "name": group})
    with pytest.raises(AssertionError, match="nobody else has them"):
        granted(objects)

"""Every overlay and every component renders, fits the schemas, and keeps the promises of the design."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest

from shared.authorization import read_policy
from shared.settings import ServiceSettings
from tests.deploy.kustomize import COMPONENTS, K8S, OVERLAYS, REPOSITORY, TARGETS, objects, pod_of

SERVICES = {"feedback", "profile", "trainer", "recommend"}
# Described by operators, not by Kubernetes: no schema here knows them.
FOREIGN = ("cert-manager.io", "monitoring.coreos.com", "postgresql.cnpg.io", "external-secrets.io")


def workloads(target: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for manifest in objects(target):
        pod = pod_of(manifest)
        if pod is not None:
            found.append((f"{manifest['kind']}/{manifest['metadata']['name']}", pod))
    return found


def deployments(target: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in objects(target) if each["kind"] == "Deployment"}


@pytest.mark.parametrize("target", TARGETS)
def test_every_object_fits_its_schema(target: str) -> None:
    judged = 0
    for manifest in objects(target):
        if manifest["apiVersion"].startswith(FOREIGN):
            continue
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        judged += 1
    assert judged >= 20


def test_the_validation_would_see_a_misspelt_field() -> None:
    manifest = deployments("base")["feedback"]
    manifest["spec"]["template"]["spec"]["containers"][0]["readOnlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("target", TARGETS)
def test_every_pod_passes_the_restricted_standard(target: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted"""
    (namespace,) = [each for each in objects(target) if each["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    allowed_volumes = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for name, pod in workloads(target):
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", name
        assert pod["automountServiceAccountToken"] is False, name
        for volume in pod.get("volumes", []):
            assert set(volume) - {"name"} <= allowed_volumes, (name, volume)
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert {"requests", "limits"} <= container["resources"].keys(), name


@pytest.mark.parametrize("target", TARGETS)
def test_every_service_is_complete(target: str) -> None:
    by_kind: dict[str, dict[str, dict[str, Any]]] = {}
    for manifest in objects(target):
        by_kind.setdefault(manifest["kind"], {})[manifest["metadata"]["name"]] = manifest
    for kind in ("Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "HorizontalPodAutoscaler"):
        assert by_kind[kind].keys() >= SERVICES, kind
    for name in SERVICES:
        assert by_kind["Service"][name]["spec"]["clusterIP"] == "None"
        assert by_kind["ServiceAccount"][name]["automountServiceAccountToken"] is False
        assert by_kind["HorizontalPodAutoscaler"][name]["apiVersion"] == "autoscaling/v2"
        assert by_kind["Deployment"][name]["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert by_kind["Job"].keys() == {"migrate-feedback", "migrate-profile", "migrate-trainer"}
    assert by_kind["CronJob"]["train"]["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_base_speaks_plain_http2_and_mutual_tls_says_otherwise() -> None:
    def protocols(target: str) -> set[str]:
        return {
            port["appProtocol"]
            for each in objects(target)
            if each["kind"] == "Service" and each["metadata"]["name"] in SERVICES
            for port in each["spec"]["ports"]
            if port["name"] == "grpc"
        }

    assert protocols("base") == {"kubernetes.io/h2c"}
    assert protocols("components/mtls") == {"https"}


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_probes_are_grpc_and_liveness_depends_on_nothing(name: str) -> None:
    (container,) = deployments("base")[name]["spec"]["template"]["spec"]["containers"]
    health = {port["name"]: port["containerPort"] for port in container["ports"]}["health"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == health
    # `liveness` answers while the process does; the service's own name follows its dependencies.
    assert container["livenessProbe"]["grpc"]["service"] == "liveness"
    assert "service" not in container["readinessProbe"]["grpc"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_the_grace_period_is_longer_than_the_drain(name: str) -> None:
    pod = deployments("base")[name]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = float(
        next(each["value"] for each in container["env"] if each["name"] == "SHOPKEEPER_DRAIN_SECONDS")
    )
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before + drain


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_requests_and_limits_are_those_that_follow_from_measurements(name: str) -> None:
    text = (REPOSITORY / "docs" / "operating.md").read_text()
    rows = re.findall(rf"^\| {name} \|.*\| (\S+), (\w+) \| (\w+) \|$", text, re.M)
    (container,) = deployments("base")[name]["spec"]["template"]["spec"]["containers"]
    asked, limited = container["resources"]["requests"], container["resources"]["limits"]
    assert rows == [(asked["cpu"], asked["memory"], limited["memory"])]


@pytest.mark.parametrize("target", TARGETS)
def test_every_variable_is_a_setting(target: str) -> None:
    from services.feedback.settings import FeedbackSettings
    from services.profile.settings import ProfileSettings
    from services.recommend.settings import RecommendSettings
    from services.trainer.settings import TrainerSettings

    own = {
        "feedback": FeedbackSettings, "profile": ProfileSettings, "trainer": TrainerSettings, "recommend": RecommendSettings,
    }  # fmt: skip
    for name, pod in workloads(target):
        settings = own.get(name.split("/")[1], ServiceSettings)
        known = {f"SHOPKEEPER_{field.upper()}" for field in settings.model_fields} | {"SHOPKEEPER_SECRETS"}
        for container in pod["containers"]:
            given = {
                each["name"] for each in container.get("env", []) if each["name"].startswith("SHOPKEEPER_")
            }
            assert given <= known, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_only_compose(overlay: str) -> None:
    assert [path.name for path in (K8S / "overlays" / overlay).iterdir() if path.name != "README.md"] == [
        "kustomization.yaml"
    ]
    text = (K8S / "overlays" / overlay / "kustomization.yaml").read_text()
    assert set(re.findall(r"^(\w+):", text, re.M)) <= {
        "apiVersion",
        "kind",
        "namespace",
        "resources",
        "components",
        "images",
    }


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_says_what_it_is_for(component: str) -> None:
    assert (K8S / "components" / component / "README.md").read_text().startswith(f"# {component}\n")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_secret_claim_and_config_map_that_is_mounted_is_made_or_documented(overlay: str) -> None:
    made = {(each["kind"], each["metadata"]["name"]) for each in objects(overlay_path(overlay))}
    made |= {
        ("Secret", each["metadata"]["name"])
        for each in objects(overlay_path(overlay))
        if each["kind"] == "ExternalSecret"
    }
    made |= {
        ("Secret", each["spec"]["secretName"])
        for each in objects(overlay_path(overlay))
        if each["kind"] == "Certificate"
    }
    # By the operator, of the cluster's name.
    made |= {
        ("Secret", f"{each['metadata']['name']}-app")
        for each in objects(overlay_path(overlay))
        if each["kind"] == "Cluster"
    }
    made |= {
        ("Secret", name)
        for name in re.findall(
            r"^\| `(shopkeeper-[a-z-]+)` \|", (K8S / "base" / "README.md").read_text(), re.M
        )
    }
    for name, pod in workloads(overlay_path(overlay)):
        for volume in pod.get("volumes", []):
            sources = [volume, *(volume.get("projected") or {}).get("sources", [])]
            for source in sources:
                for kind, key, field in (
                    ("Secret", "secret", "secretName"), ("Secret", "secret", "name"), ("ConfigMap", "configMap", "name"),
                    ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
                ):  # fmt: skip
                    wanted = (source.get(key) or {}).get(field)
                    assert wanted is None or (kind, wanted) in made, (name, kind, wanted)


def overlay_path(overlay: str) -> str:
    return f"overlays/{overlay}"


def test_recommend_is_let_to_no_database_and_mounts_no_private_key() -> None:
    pod = deployments("overlays/production")["recommend"]["spec"]["template"]["spec"]
    secrets = {
        source["secret"].get("secretName") or source["secret"].get("name")
        for volume in pod["volumes"]
        for source in [volume, *(volume.get("projected") or {}).get("sources", [])]
        if "secret" in source
    }
    assert secrets == {"shopkeeper-user-keys", "recommend-tls"}
    for policy in objects("overlays/production"):
        if policy["kind"] == "NetworkPolicy" and "database" in policy["metadata"]["name"]:
            assert "recommend" not in str(policy["spec"])


def test_the_network_lets_through_what_the_policy_lets_through() -> None:
    """An edge between services that the one allows and the other does not is a mistake in either."""
    allowed = read_policy(K8S / "base" / "policy.yaml")
    by_policy = {
        (role, rpc.split(".")[1])
        for rpc, roles in allowed.roles_for.items()
        for role in roles & {"recommend", "feedback", "profile", "trainer", "scheduler"}
    }
    names = {"train": "scheduler"}
    by_network = set()
    for policy in objects("components/network-policies"):
        if policy["kind"] != "NetworkPolicy" or policy["spec"]["policyTypes"] != ["Ingress"]:
            continue
        target = policy["spec"]["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/name")
        for rule in policy["spec"].get("ingress", []):
            for peer in rule.get("from", []):
                name = peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/name")
                if target in SERVICES and name:
                    by_network.add((names.get(name, name), target))
    assert by_network == by_policy


@pytest.mark.parametrize("target", TARGETS)
def test_no_secret_is_an_environment_variable(target: str) -> None:
    for name, pod in workloads(target):
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert not [each for each in container.get("envFrom", []) if "secretRef" in each], name
            asked = [each.get("valueFrom", {}) for each in container.get("env", [])]
            assert not [each for each in asked if "secretKeyRef" in each], name

"""Every manifest below a directory, strictly against the API's published schema; and each
kustomization's resources, files and generated names."""
import pathlib
import sys

import kubernetes_validate
import yaml

VERSION = "1.34"
root = pathlib.Path(sys.argv[1])
checked = 0


def documents(path):
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def strings(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
    elif isinstance(value, str):
        yield value


for path in sorted(root.rglob("*.yaml")):
    for document in documents(path):
        if path.name == "kustomization.yaml":
            for name in document["resources"]:
                assert (path.parent / name).exists(), f"{path}: {name} is not there"
            for generator in document.get("configMapGenerator", []):
                for name in generator["files"]:
                    assert (path.parent / name).exists(), f"{path}: {name} is not there"
            listed = {path.parent / name for name in document["resources"]}
            others = set(path.parent.glob("*.yaml")) - {path}
            assert others <= listed, f"{path} does not list {others - listed}"
        elif document["apiVersion"].startswith("monitoring.coreos.com/"):
            pass  # podmonitor.js has its schema.
        else:
            kubernetes_validate.validate(document, VERSION, strict=True)
            checked += 1
assert checked >= 6, f"only {checked} manifests"

# A schema that accepts everything would prove nothing.
daemonset = documents(root / "base/daemonset.yaml")[0]
daemonset["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
try:
    kubernetes_validate.validate(daemonset, VERSION, strict=True)
except Exception:
    pass
else:
    sys.exit("a misspelt key was accepted")

# What one names, another has.
generated = documents(root / "base/kustomization.yaml")[0]
spec = documents(root / "base/daemonset.yaml")[0]["spec"]["template"]["spec"]
maps = {g["name"] for g in generated["configMapGenerator"]}
volumes = {v["name"] for v in spec["volumes"]}
assert {v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v} <= maps
for container in spec["containers"]:
    assert {m["name"] for m in container["volumeMounts"]} <= volumes, container["name"]

# Who measures may look, and do nothing else: no user but nobody, no capability, no network of
# the node's, no image by a name that may become another's.
measures, policy = documents(root / "base/measures.yaml")
measured = measures["spec"]["template"]["spec"]
volumes = {v["name"] for v in measured["volumes"]}
assert not any(measured.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
assert measured["securityContext"]["runAsNonRoot"] and measured["securityContext"]["runAsUser"] == 65534
for container in measured["containers"]:
    own = container["securityContext"]
    assert own["capabilities"] == {"drop": ["ALL"]} and not own["allowPrivilegeEscalation"], container["name"]
    assert own["readOnlyRootFilesystem"] and "runAsUser" not in own, container["name"]
    assert {m["name"] for m in container["volumeMounts"]} <= volumes, container["name"]
for container in measured["containers"] + measured["initContainers"] + spec["containers"]:
    # Kustomize names ours.
    assert container["image"] == "vmcache" or "@sha256:" in container["image"], container["image"]
labels = measures["spec"]["template"]["metadata"]["labels"]
assert policy["spec"]["podSelector"]["matchLabels"] == labels
ports = {p["name"] for c in measured["containers"] for p in c.get("ports", [])}
assert policy["spec"]["ingress"][0]["ports"][0]["port"] in ports
monitor = documents(root / "overlays/monitoring/podmonitor.yaml")[0]
assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= ports
assert monitor["spec"]["selector"]["matchLabels"] == labels
priority = documents(root / "base/priorityclass.yaml")[0]["metadata"]["name"]
assert spec["priorityClassName"] == priority

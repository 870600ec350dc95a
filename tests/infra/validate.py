"""Manifests against the schemas of Kubernetes and KubeRay; an unknown field is a problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

SCHEMAS = Path(__file__).parent / "schemas"
_CONFIG_MAP = "kubernetes.json#/$defs/io.k8s.api.core.v1.ConfigMap"
_KINDS = {
    ("v1", "ConfigMap"): _CONFIG_MAP,
    ("ray.io/v1", "RayCluster"): "kuberay.json#/$defs/RayCluster",
    ("ray.io/v1", "RayJob"): "kuberay.json#/$defs/RayJob",
}


def _registry() -> Registry[Any]:
    contents = [json.loads((SCHEMAS / n).read_text()) for n in ("kubernetes.json", "kuberay.json")]
    return Registry().with_resources((c["$id"], Resource.from_contents(c)) for c in contents)


def problems(manifest: str) -> list[str]:
    """What is wrong with each document of a manifest: where, and what."""
    found, registry = [], _registry()
    for document in yaml.safe_load_all(manifest):
        kind = document.get("apiVersion"), document.get("kind")
        if kind not in _KINDS:
            found.append(f"no schema for {kind}")
            continue
        validator = Draft202012Validator({"$ref": _KINDS[kind]}, registry=registry)
        found += [
            f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)
        ]
    return found

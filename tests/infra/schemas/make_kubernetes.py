"""Writes `kubernetes.json`: what Kubernetes' own schema says of the objects in our manifests.

The source is the PyPI package `kubernetes-validate`, which carries the OpenAPI definitions of each
Kubernetes release as JSON schemas; it is 100 MB, so a part of it is kept here. Descriptions are
left out, only what our roots refer to is kept, and an object takes no field that it does not name.

Usage: pip install kubernetes-validate==1.37.0; python tests/infra/schemas/make_kubernetes.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

RELEASE = "v1.37.0-local"
CORE = "io.k8s.api.core.v1."
ROOTS = [
    CORE + name
    for name in (
        "ConfigMap",
        "EnvFromSource",
        "EnvVar",
        "EnvVarSource",
        "PodTemplateSpec",
        "ResourceRequirements",
        "SecurityContext",
        "Service",
        "VolumeMount",
    )
] + ["io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"]


def trimmed(value: Any) -> Any:
    """A schema without descriptions, strict, its references within the file."""
    if isinstance(value, list):
        return [trimmed(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {
        name: {key: trimmed(item) for key, item in inner.items()}
        if name == "properties"
        else trimmed(inner)
        for name, inner in value.items()
        if name != "description" and not name.startswith("x-")
    }
    if "$ref" in found:
        found["$ref"] = "#" + found["$ref"].partition("#")[2]
    if "properties" in found:
        found["additionalProperties"] = False
    return found


def references(schema: Any) -> set[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(schema, list):
        return set().union(*map(references, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["$ref"].rpartition("/")[2]} if isinstance(schema.get("$ref"), str) else set()
    return own.union(*map(references, schema.values()))


def main() -> None:
    source = files("kubernetes_validate") / "kubernetes-json-schema" / RELEASE / "_definitions.json"
    every = json.loads(source.read_text())["$defs"]
    kept: dict[str, Any] = {}
    wanted = set(ROOTS)
    while wanted:
        name = wanted.pop()
        kept[name] = trimmed(every[name])
        wanted |= references(kept[name]) - set(kept)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "kubernetes.json",
        "$comment": f"kubernetes-validate {version('kubernetes-validate')}, {RELEASE}, by "
        "make_kubernetes.py",
        "$defs": dict(sorted(kept.items())),
    }
    target = Path(__file__).parent / "kubernetes.json"
    target.write_text(json.dumps(schema, indent=None, separators=(",", ":")) + "\n")
    print(f"{target.name}: {len(kept)} definitions, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

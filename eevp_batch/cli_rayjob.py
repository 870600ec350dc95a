"""The command that prints a job's manifest for Kubernetes. Heavy imports are inside it."""

from __future__ import annotations

import click

from eevp_batch.console import spec_overrides


@click.command()
@click.argument("spec", metavar="SPEC")
@spec_overrides
@click.option("--image", required=True, help="Image with this package, which every node can pull.")
@click.option(
    "--token-secret",
    default="eevp-ray-token",
    show_default=True,
    metavar="NAME",
    help="Secret whose key auth_token holds Ray's token.",
)
@click.option(
    "--env-secret",
    metavar="NAME",
    help="Secret that becomes environment variables: keys for storage, HF_TOKEN.",
)
@click.option("--service-account", metavar="NAME", help="Whose rights the pods have.")
@click.option(
    "--claim",
    metavar="NAME:/PATH",
    help="PersistentVolumeClaim that every pod sees at that path; several pods write to it.",
)
@click.option("--memory", default="32Gi", show_default=True, help="Of one worker pod.")
@click.option(
    "--node",
    "nodes",
    multiple=True,
    metavar="LABEL=VALUE",
    help="Workers go to nodes with this label, also where a taint of that name keeps others "
    "away: cloud.google.com/gke-spot=true. May be repeated.",
)
def rayjob(
    spec: str,
    overrides: tuple[str, ...],
    image: str,
    token_secret: str,
    env_secret: str | None,
    service_account: str | None,
    claim: str | None,
    memory: str,
    nodes: tuple[str, ...],
) -> None:
    """Print a job as a RayJob manifest for KubeRay: `... | kubectl apply -f -`."""
    from eevp_batch.rayjob import Pods, render_rayjob
    from eevp_batch.spec_file import read_spec

    pods = Pods(
        image=image,
        token_secret=token_secret,
        env_secret=env_secret,
        service_account=service_account,
        claim=claim,
        memory=memory,
        nodes=nodes,
    )
    click.echo(render_rayjob(read_spec(spec, overrides), pods), nl=False)

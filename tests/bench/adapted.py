"""What an adapter does for the exits of a job: two folders of fitted exits, the same rows.

Held-out figures of both fits, and both replayed with bridged keys and values on rows that neither
has seen: the share of tokens that may leave while at most 1, 2 or 5 % differ from the original.

    python -m tests.bench.adapted --job jobs/extract.yaml --from out/extract --rows 300 \
        --frozen out/extract-exits --adapted out/extract-adapted --out FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from eevp_batch.engine.cut import cut_model
from eevp_batch.engine.load import load_job_model
from eevp_batch.fitted_config import read_manifest
from eevp_batch.prepare import prepare
from eevp_batch.tune.calibrate_job import job_costs, replay_settings
from eevp_batch.tune.candidates import NEVER, candidate_grid
from eevp_batch.tune.job_rows import output_rows
from eevp_batch.tune.replay import Replay
from eevp_batch.tune.states import Row
from eevp_batch.tune.text_distance import disagreement
from tests.bench.machine import setup

DELTAS = (0.01, 0.02, 0.05)
"""Shares of a row's tokens that may differ from what the original generated."""
SETTINGS = 12
"""Thresholds that are replayed for each of them."""


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--from", dest="source", required=True, help="output at full depth")
    parser.add_argument("--frozen", required=True, help="folder that fit wrote")
    parser.add_argument("--adapted", required=True, help="the same with --adapter-rank")
    parser.add_argument("--rows", type=int, default=300, help="that neither has seen")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Look at both folders and print what each lets leave."""
    chosen = options()
    folders = {"frozen": Path(chosen.frozen), "adapted": Path(chosen.adapted)}
    found = {name: fitted(folder) for name, folder in folders.items()}
    rows = unseen(chosen, list(folders.values()))
    for name, folder in folders.items():
        found[name]["replayed"] = replayed(chosen, folder, rows)
        show(name, found[name])
    if chosen.out is not None:
        facts = {"job": chosen.job, "rows": len(rows), "set": chosen.overrides}
        chosen.out.write_text(json.dumps({"setup": setup() | facts, **found}, indent=1) + "\n")


def fitted(folder: Path) -> dict[str, Any]:
    """The figures of a fit."""
    manifest = read_manifest(folder)
    figures = manifest["figures"]
    return {
        "rank": manifest["adapter_rank"],
        "rows": manifest["data"]["rows"],
        "states_s": manifest["data"]["states_s"],
        "fit_s": figures["fit_s"],
        "heads": figures["heads"],
        "adapter": figures.get("adapter"),
    }


def unseen(chosen: argparse.Namespace, folders: list[Path]) -> list[Row]:
    """Rows of the output that nothing was fitted to."""
    known = [
        key
        for folder in folders
        for key in str(read_manifest(folder)["data"]["prompt_keys"]).split()
    ]
    job = prepare(chosen.job, [*chosen.overrides, "exit.mode=off"])
    encoder = load_job_model(job.spec, job.model).encoder
    fields = job.plan.fields
    return output_rows(chosen.source, fields, encoder, chosen.rows, seed=1, without=known)


def replayed(chosen: argparse.Namespace, folder: Path, rows: list[Row]) -> dict[str, Any]:
    """By delta, the cheapest thresholds that keep to it, and who leaves; chosen on these rows."""
    exits = ["exit.mode=on", f"exit.heads={folder.resolve()}", "exit.kv=bridge"]
    job = prepare(chosen.job, [*chosen.overrides, *exits])
    weights, tokenizer, *_ = load_job_model(job.spec, job.model)
    cut = cut_model(weights, tokenizer, job.spec.exit)
    settings, costs = replay_settings(cut, job.spec), job_costs(cut, job.spec.exit, rows)
    early = cut.model.exit_layers[:-1]
    never = tuple([NEVER] * len(early))
    grid = {never}
    for delta in DELTAS:
        grid |= set(candidate_grid(cut.model, settings, rows, costs, delta, SETTINGS))
    tried = []
    for thresholds, some in zip(
        grid, Replay(cut.model, settings).run(rows, list(grid)), strict=True
    ):
        layers = [layer for one in some for layer in one.exit_layers]
        shares = [layers.count(layer) / len(layers) for layer in early]
        losses = [
            disagreement(one.token_ids, row.generated_ids)
            for one, row in zip(some, rows, strict=True)
        ]
        tried.append(
            {
                "thresholds": thresholds,
                "shares": shares,
                "leaving": sum(shares),
                "mean_layer": sum(layers) / len(layers),
                "risk": sum(losses) / len(losses),
                "speed": costs.full_depth / costs.with_exits(early, shares),
            }
        )
    kept: dict[str, Any] = {"full_depth": next(s for s in tried if s["thresholds"] == never)}
    for delta in DELTAS:
        good = [s for s in tried if s["risk"] <= delta and s["thresholds"] != never]
        kept[str(delta)] = max(good, key=lambda s: float(s["speed"]), default=None)
    return kept


def show(name: str, found: dict[str, Any]) -> None:
    """Print one folder's figures."""
    print(f"{name}: states {found['states_s']} s, fit {found['fit_s']} s")
    for layer, head in found["heads"].items():
        leaving = {k: round(v, 3) for k, v in head["share_leaving_of_all"].items()}
        print(f"  layer {layer}: agrees {head['agreement']:.3f}, leaving {leaving}")
    if found["adapter"] is not None:
        print(f"  full depth kept: {found['adapter']['full_depth_agreement']:.4f}")
    for delta, one in found["replayed"].items():
        if one is None:
            print(f"  replayed, at most {delta}: none")
        else:
            print(
                f"  replayed, {delta}: {one['leaving']:.3f} leave, mean layer "
                f"{one['mean_layer']:.1f}, risk {one['risk']:.4f}, predicted {one['speed']:.2f}"
            )


if __name__ == "__main__":
    main()

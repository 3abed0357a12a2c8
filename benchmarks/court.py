"""The court of scorers: every scorer of explanations on units of known meaning and exact density.

    python benchmarks/court.py [--units 24] [--tokens 400000] [--only NAME ...] [--write]

Prints, for each metric, the share of units whose true explanation ranks above each kind of false
one (lowest of the kinds; `lmmono audit-scorer NAME --densities` has all), and the least density
from which on it is 95 % for all kinds. What is measured is kept in `--folder`, a file per scorer:
run again after a kill, it goes on. `--write` writes `lmmono/registry/least_densities.py` from it,
with the commit, so that records, tables and means know from which density on a scorer holds.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import activation_store as astore
from lmmono.registry.scorers import SCORERS
from lmmono.scores.court import DENSITIES, NOISES, CourtVerdict, hold_court, write_court

SIDES = {"sides": ["active", "predicted", "random"], "per_side": 20}
SETTINGS: dict[str, dict[str, object]] = {"simulation_tar": SIDES, "detection": SIDES}
METRICS: dict[str, tuple[str, ...]] = {
    "simulation_tar": ("", "_recall", "_precision", "_f1", "_weighted"),
    "detection": ("", "_recall", "_precision", "_f1", "_weighted"),
    "population": ("_f1", "_iou", "_auprc", "_cosine", "_pearson"),
}
HOME = Path("lmmono/registry/least_densities.py")
HEAD = '''"""From which density on each metric ranks true explanations first; written, not typed.

    {command}

at commit {commit}: {n_units} units of each density and noise, {n_tokens:,} tokens, seed {seed}.
"""

COURT: dict[str, dict[str, float | None]] = {{
'''
TAIL = '''}
"""Least density by metric, of exact and of noisy units; None where it passes at none. A metric that
is not here was not before the court."""
'''


def metrics_of(scorer: str) -> list[str]:
    """Return the metrics of a scorer that come before the court."""
    return [f"{scorer}{end}" for end in METRICS.get(scorer, ("",))] if scorer != "population" else [
        f"population{end}" for end in METRICS["population"]]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--units", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/court"))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--commit", help="where it was measured, for --write; HEAD by default")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the page")
    options = parser.parse_args()
    size = {"n_units": options.units, "n_tokens": options.tokens, "seed": options.seed}
    options.folder.mkdir(parents=True, exist_ok=True)
    place = options.folder / "-".join(str(value) for value in size.values())
    place.mkdir(exist_ok=True)
    able = [
        name for name, each in SCORERS.items() if each.needs in (("explanation",), ("program",))
    ]
    units = None
    for name in options.only or able:
        path = place / f"{name}.json"
        if not path.exists():
            if units is None:
                # written anew in each call: a store that a kill cut short would be believed
                store_path = place / f"store-{time.time_ns()}"
                store = astore.open(store_path, mode="w")
                units = write_court(store, **size)
            started = time.process_time()
            verdicts = hold_court(store, units, name, metrics=metrics_of(name),
                                  settings=SETTINGS.get(name))  # fmt: skip
            seconds = time.process_time() - started
            rows = {verdict.metric: verdict.rows for verdict in verdicts}
            path.write_text(json.dumps({"seconds": seconds, "rows": rows}))
        show(path)
    if options.markdown:
        tables(place)
    if options.write:
        write(place, size, options.commit)


def read(path: Path) -> tuple[float, list[CourtVerdict]]:
    """Return the seconds and the verdicts of a file."""
    kept = json.loads(path.read_text())
    return kept["seconds"], [CourtVerdict(name, tuple(rows)) for name, rows in kept["rows"].items()]


def show(path: Path) -> None:
    """Print the worst kind of each density."""
    seconds, verdicts = read(path)
    print(f"{path.stem}: {seconds:.0f} s of a processor", flush=True)
    for verdict in verdicts:
        for noise in NOISES:
            cells: list[str] = []
            for density in DENSITIES:
                rows = [r for r in verdict.rows if (r["noise"], r["density"]) == (noise, density)]
                worst = min(rows, key=lambda row: row["ranking"])
                cells.append(f"{density:g}: {worst['ranking']:.2f} {worst['false']}")
            least = verdict.least_density(noise)
            print(f"  {verdict.metric} {noise}, least {least}: {'; '.join(cells)}", flush=True)


def tables(place: Path) -> None:
    """Print tables in Markdown: the worst kind by density, then NeuronEval's two tests."""
    verdicts = [verdict for path in sorted(place.glob("*.json")) for verdict in read(path)[1]]
    heads = " | ".join(f"{100 * density:g} %" for density in DENSITIES)
    line = "|---" * (len(DENSITIES) + 2) + "|"
    for noise in NOISES:
        print(f"\n{noise}: worst of all kinds\n\n| metric | {heads} | least |\n{line}")
        for verdict in verdicts:
            cells = [min(_rankings(verdict, noise, density)) for density in DENSITIES]
            least = verdict.least_density(noise)
            shown = " | ".join(f"{cell:.2f}" for cell in cells)
            end = "none" if least is None else f"{100 * least:g} %"
            print(f"| `{verdict.metric}` | {shown} | {end} |")
    for noise in NOISES:
        print(f"\n{noise}: missing labels, extra labels\n\n| metric | {heads} | |\n{line}")
        for verdict in verdicts:
            cells = [
                ", ".join(
                    f"{_rankings(verdict, noise, density, kind)[0]:.2f}"
                    for kind in ("missing_labels", "extra_labels")
                )  # fmt: skip
                for density in DENSITIES
            ]
            print(f"| `{verdict.metric}` | {' | '.join(cells)} | |")


def _rankings(verdict: CourtVerdict, noise: str, density: float, kind: str = "") -> list[float]:
    return [
        row["ranking"]
        for row in verdict.rows
        if (row["noise"], row["density"]) == (noise, density) and kind in ("", row["false"])
    ]


def write(place: Path, size: dict[str, int], commit: str | None) -> None:
    """Write the constant that the registry reads."""
    say = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(say, capture_output=True, text=True, check=True).stdout.strip()
    commit = commit or head
    command = (
        f"python benchmarks/court.py --units {size['n_units']} --tokens {size['n_tokens']} --write"
    )
    lines = [HEAD.format(command=command, commit=commit, **size)]
    for path in sorted(place.glob("*.json")):
        for verdict in read(path)[1]:
            least = {noise: verdict.least_density(noise) for noise in NOISES}
            shown = ", ".join(f'"{noise}": {value}' for noise, value in least.items())
            lines.append(f'    "{verdict.metric}": {{{shown}}},\n')
    HOME.write_text("".join(lines) + TAIL)


if __name__ == "__main__":
    main()

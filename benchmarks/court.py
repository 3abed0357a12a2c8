"""The court of scorers: every scorer of explanations on units of known meaning and exact density.

    python benchmarks/court.py [--units 24] [--tokens 400000] [--only NAME ...] [--write]

Prints, for each metric, the share of units whose true explanation ranks above each kind of false
one (lowest of the kinds; `lmmono audit-scorer NAME --densities` has all), and the least density
from which on it is 95 % for all kinds. What is measured is kept in `--folder`, a file per scorer:
run again after a kill, it goes on. `--write` writes `lmmono/registry/least_densities.py` from it,
with the commits, so that records, tables and means know from which density on a scorer holds.

`embedding` and `surprisal` are given what knows words and nothing else: an encoder that counts
them, a reader that expects those that were named. Real ones err in other ways.
"""

import argparse
import json
import re
import subprocess
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import activation_store as astore
from lmmono.clients.client import Reading
from lmmono.registry.scorers import SCORERS
from lmmono.scores.court import DENSITIES, NOISES, CourtVerdict, hold_court, write_court
from lmmono.scores.embedding import SentenceEncoder

D_BAG = 512
"""Numbers that a bag of words is hashed to: texts of 32 words of 20,000 hardly collide."""


def bag_of_words(texts: Sequence[str]) -> np.ndarray:
    """Return a vector per text that counts its words, with signs, so that collisions cancel."""
    bags = np.zeros((len(texts), D_BAG), np.float32)
    for bag, text in zip(bags, texts, strict=True):
        for word in re.findall(r"w\d+", text):
            key = zlib.crc32(word.encode())
            bag[key % D_BAG] += 1.0 if key & (1 << 20) else -1.0
    return bags


class WordReader:
    """A client that expects words that stood before, e^3 times as much as others."""

    name = "word reader"

    def complete(self, *_: Any, **__: Any) -> list[Any]:
        raise AssertionError("it reads only")

    def read(self, texts: Sequence[str], **_: Any) -> list[Reading]:
        return [self._read(text) for text in texts]

    def _read(self, text: str) -> Reading:
        tokens, said = re.findall(r"\s*\S+|\s+$", text), set[str]()
        logprobs: list[float | None] = []
        for token in tokens:
            word = token.strip(" ,'\n")
            logprobs.append(-1.0 if word in said else -4.0)
            said.add(word)
        return Reading(tuple(tokens), (None, *logprobs[1:]))


SIDES: dict[str, Any] = {"sides": ["active", "predicted", "random"], "per_side": 20}
SETTINGS: dict[str, dict[str, Any]] = {
    "simulation_tar": SIDES,
    "detection": SIDES,
    "fuzz": SIDES | {"sides": ["active", "predicted"]},
    "anthropic_intervals": SIDES,
    "embedding": SIDES | {"encoder": SentenceEncoder("bag of words", bag_of_words)},
    "surprisal": SIDES,
}
SIDED = ("", "_recall", "_precision", "_f1", "_weighted")
METRICS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(SETTINGS, SIDED),
    "fuzz": SIDED[:4],
    "population": ("_f1", "_iou", "_auprc", "_cosine", "_pearson"),
}
HOME = Path("lmmono/registry/least_densities.py")
HEAD = '''"""From which density on each metric ranks true explanations first; written, not typed.

    {command}

at {commits}: {n_units} units of each density and noise, {n_tokens:,} tokens, seed {seed}.
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
    parser.add_argument("--commit", help="where it is measured; HEAD by default")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the page")
    options = parser.parse_args()
    size = {"n_units": options.units, "n_tokens": options.tokens, "seed": options.seed}
    options.folder.mkdir(parents=True, exist_ok=True)
    place = options.folder / "-".join(str(value) for value in size.values())
    place.mkdir(exist_ok=True)
    at_hand = {"explanation", "program", "encoder", "client"}
    able = [
        name
        for name, each in SCORERS.items()
        if each.reads_explanations and not set(each.needs) - at_hand
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
                                  settings=SETTINGS.get(name),
                                  client=WordReader() if name == "surprisal" else None)  # fmt: skip
            seconds = time.process_time() - started
            rows = {verdict.metric: verdict.rows for verdict in verdicts}
            head = options.commit or git_head()
            path.write_text(json.dumps({"seconds": seconds, "commit": head, "rows": rows}))
        show(path)
    if options.markdown:
        tables(place)
    if options.write:
        write(place, size)


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


def git_head() -> str:
    """Return the commit of this checkout."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def write(place: Path, size: dict[str, int]) -> None:
    """Write the constant that the registry reads."""
    kept = sorted({json.loads(path.read_text())["commit"] for path in place.glob("*.json")})
    commits = f"commit{'s' * (len(kept) > 1)} {', '.join(kept)}"
    command = (
        f"python benchmarks/court.py --units {size['n_units']} --tokens {size['n_tokens']} --write"
    )
    lines = [HEAD.format(command=command, commits=commits, **size)]
    for path in sorted(place.glob("*.json")):
        for verdict in read(path)[1]:
            least = {noise: verdict.least_density(noise) for noise in NOISES}
            shown = ", ".join(f'"{noise}": {value}' for noise, value in least.items())
            lines.append(f'    "{verdict.metric}": {{{shown}}},\n')
    HOME.write_text("".join(lines) + TAIL)


if __name__ == "__main__":
    main()

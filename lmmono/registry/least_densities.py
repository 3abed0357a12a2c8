"""From which density on each metric ranks true explanations first; written, not typed.

    python benchmarks/court.py --units 24 --tokens 400000 --write

at commits 671724d, d7afaf3: 24 units of each density and noise, 400,000 tokens, seed 0.
"""

COURT: dict[str, dict[str, float | None]] = {
    "anthropic_intervals": {"exact": 0.01, "noisy": 0.01},
    "anthropic_intervals_recall": {"exact": None, "noisy": None},
    "anthropic_intervals_precision": {"exact": None, "noisy": None},
    "anthropic_intervals_f1": {"exact": 0.0001, "noisy": 0.0001},
    "anthropic_intervals_weighted": {"exact": 0.0001, "noisy": 0.0003},
    "detection": {"exact": 0.001, "noisy": None},
    "detection_recall": {"exact": None, "noisy": None},
    "detection_precision": {"exact": None, "noisy": None},
    "detection_f1": {"exact": 0.0001, "noisy": 0.0001},
    "detection_weighted": {"exact": 0.0001, "noisy": 0.0001},
    "fuzz": {"exact": 0.1, "noisy": 0.1},
    "fuzz_recall": {"exact": None, "noisy": None},
    "fuzz_precision": {"exact": None, "noisy": None},
    "fuzz_f1": {"exact": 0.0001, "noisy": 0.0001},
    "intruder_program": {"exact": None, "noisy": None},
    "population_f1": {"exact": 0.0001, "noisy": 0.0001},
    "population_iou": {"exact": 0.0001, "noisy": 0.0001},
    "population_auprc": {"exact": 0.0001, "noisy": 0.0001},
    "population_cosine": {"exact": 0.0001, "noisy": 0.0003},
    "population_pearson": {"exact": 0.0001, "noisy": 0.0003},
    "simulation_random": {"exact": 0.01, "noisy": 0.1},
    "simulation_tar": {"exact": 0.003, "noisy": 0.003},
    "simulation_tar_recall": {"exact": None, "noisy": None},
    "simulation_tar_precision": {"exact": None, "noisy": None},
    "simulation_tar_f1": {"exact": 0.0001, "noisy": 0.0001},
    "simulation_tar_weighted": {"exact": 0.0001, "noisy": 0.0003},
}
"""Least density by metric, of exact and of noisy units; None where it passes at none. A metric that
is not here was not before the court."""

"""A fit that was stopped, or killed, or shared between processes, ends with the same bits."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import pytest
import torch

import lmmono as lm
from lmmono.dictionaries.sae_training import CHECKPOINT
from lmmono.dictionaries.vector_source import ArrayVectors
from lmmono.errors import DictionaryError, TrainingStopped
from tests.test_sae import ARCHS, make, planted, vectors


class Stopped(Exception):
    """Stands for a crash between two steps."""


def stop_at(step: int, number: int | None) -> Any:
    """Return a progress that sends this process a signal, or crashes it, at a step."""

    def progress(what: str, done: int, total: int, **facts: float) -> None:
        if done == step and number is None:
            raise Stopped
        if done == step and number is not None:
            os.kill(os.getpid(), number)

    return progress


def rows(sae: lm.SAE) -> list[dict[str, Any]]:
    assert sae.history is not None
    return sae.history.drop_columns(["seconds"]).to_pylist()


@pytest.mark.parametrize("arch", ARCHS)
def test_a_stopped_fit_goes_on_to_the_same_bits(arch: str, tmp_path: Path) -> None:
    """80 steps over 8 batches an epoch: stopped in warm-up and in decay, inside an epoch."""
    settings = {"warmup_steps": 20, "decay_fraction": 0.5, "dead_window_steps": 10}
    whole = make(arch, **settings).fit(vectors())
    for step in (13, 61):
        with pytest.raises(TrainingStopped, match=f"after step {step}; everything is saved"):
            make(arch, **settings).fit(
                vectors(), folder=tmp_path, progress=stop_at(step, signal.SIGTERM)
            )
        assert (tmp_path / CHECKPOINT).exists()
    torch.manual_seed(99)
    sae = make(arch, **settings).fit(vectors(), folder=tmp_path)
    assert sae.digest == whole.digest
    assert rows(sae) == rows(whole)
    assert {k: v for k, v in sae.facts.items() if k != "seconds"} == {
        k: v for k, v in whole.facts.items() if k != "seconds"
    }
    assert not (tmp_path / CHECKPOINT).exists()
    assert lm.load_dictionary(tmp_path).digest == whole.digest


def test_ctrl_c_saves_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make("topk").fit(vectors(), folder=tmp_path, progress=stop_at(33, signal.SIGINT))
    steps: list[int] = []
    sae = make("topk").fit(
        vectors(), folder=tmp_path, progress=lambda w, d, t, **f: steps.append(d)
    )
    assert steps[0] == 34
    assert sae.digest == make("topk").fit(vectors()).digest


def test_without_a_folder_a_stop_says_that_nothing_is_kept() -> None:
    with pytest.raises(TrainingStopped, match="nothing is saved, because no folder was given"):
        make("topk").fit(vectors(), progress=stop_at(5, signal.SIGTERM))


def test_a_crash_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    sae = make("batchtopk")
    with pytest.raises(Stopped):
        sae.fit(vectors(), folder=tmp_path, checkpoint_every_steps=20, progress=stop_at(47, None))
    assert sae.d_in == 0
    steps: list[int] = []
    sae.fit(vectors(), folder=tmp_path, progress=lambda w, d, t, **f: steps.append(d))
    assert steps[0] == 41
    assert sae.digest == make("batchtopk").fit(vectors()).digest


def test_what_is_finished_is_loaded(tmp_path: Path) -> None:
    first = make("topk").fit(vectors(), folder=tmp_path)
    steps: list[int] = []
    again = make("topk").fit(
        vectors(), folder=tmp_path, progress=lambda w, d, t, **f: steps.append(d)
    )
    assert steps == []
    assert (again.digest, again.facts) == (first.digest, first.facts)


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_or_vectors_are_refused(finished: bool, tmp_path: Path) -> None:
    kind = "a dictionary of other settings" if finished else "made with other settings"
    if finished:
        make("topk").fit(vectors(), folder=tmp_path)
    else:
        with pytest.raises(TrainingStopped):
            make("topk").fit(vectors(), folder=tmp_path, progress=stop_at(9, signal.SIGTERM))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    other = ArrayVectors(planted(seed=5), batch_tokens=128)
    for sae, source in (
        (make("topk", k=2), vectors()),
        (make("topk", seed=9), vectors()),
        (make("topk", lr=1e-4), vectors()),
        (make("topk"), other),
        (make("topk"), ArrayVectors(planted(), batch_tokens=128, seed=1)),
    ):
        with pytest.raises(DictionaryError, match=kind):
            sae.fit(source, folder=tmp_path)
        assert sae.d_in == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_checkpoint_cut_short_is_told(keep: float, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped):
        make("topk").fit(vectors(), folder=tmp_path, progress=stop_at(9, signal.SIGTERM))
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(
        content[: int(keep * len(content)) if keep < 1 else int(keep)]
    )
    with pytest.raises(DictionaryError, match="cannot resume from this checkpoint"):
        make("topk").fit(vectors(), folder=tmp_path)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from tests.test_sae import make, vectors
sae = make("batchtopk", steps=300, dead_window_steps=50)
sae.fit(vectors(), folder=sys.argv[1], checkpoint_every_steps=7,
        progress=lambda what, done, total, **facts: print(done, flush=True))
print(sae.digest)
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are split over threads, so processes are compared with one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_process_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Killed at a random moment of its training, by the signal that nothing can catch."""
    process, until = forks.start("-c", SCRIPT, tmp_path), random.randint(6, 250)
    last = 0
    while last < until:
        assert process.process.is_alive()
        *steps, _ = (process.folder / "out").read_text().split("\n")
        last = int(steps[-1]) if steps else 0
    time.sleep(random.random() / 50)
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first, *_, digest = forks.run("-c", SCRIPT, tmp_path).split()
    assert last - 13 < int(first) <= last + 50  # from a checkpoint, not from the start
    whole = make("batchtopk", steps=300, dead_window_steps=50).fit(vectors())
    assert digest == whole.digest


TOGETHER = """
import os, sys, torch
torch.set_num_threads(1)
import lmmono as lm
from tests.test_sae import make, vectors
saes = {arch: make(arch) for arch in ("topk", "batchtopk", "standard")}
seen = set()
lm.dictionaries.fit_together(saes, vectors(), folder=sys.argv[1],
                progress=lambda what, done, total, **facts: seen.add(what))
digests = ",".join(sae.digest for sae in saes.values())
with open(sys.argv[1] + "/seen." + os.environ["RANK"], "w") as file:
    file.write(" ".join(sorted(seen)) + "\\n" + digests)
torch.distributed.destroy_process_group()
"""


@pytest.mark.usefixtures("one_thread")
def test_two_processes_share_the_dictionaries_and_each_loads_all(tmp_path: Path) -> None:
    assert forks.launch(2, "-c", TOGETHER, tmp_path) == [0, 0]
    first, second = ((tmp_path / f"seen.{rank}").read_text().split("\n") for rank in (0, 1))
    assert first[0] == "fit standard fit topk"
    assert second[0] == "fit batchtopk"
    alone = ",".join(make(a).fit(vectors()).digest for a in ("topk", "batchtopk", "standard"))
    assert first[1] == second[1] == alone


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DictionaryError, match="share their results through files; give folder"):
        lm.dictionaries.fit_together([make("topk")], vectors())

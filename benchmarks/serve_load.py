"""Twenty users of `lmmono serve` on a store of 10 M activations: times, failures, memory.

    python benchmarks/serve_load.py [--acts 10] [--users 20] [--requests 10000] [--pause 2]
        [--folder FOLDER]

The server is a process of its own, started as a user starts it; users are coroutines of this one
(httpx), each of which looks at a page for a while before it asks for the next: for `--pause`
seconds in the mean, drawn from an exponential distribution; with 0 it asks at once. They look at
units (half of the requests), lists of units, the search by a word, the console, the API. Stores
are those of `store_queries.py`. Prints the median, the 95th percentile and the largest wall time
of each kind, failures, the memory of the server in five parts of the run, and the load of the
machine.
"""

import argparse
import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

import httpx
from store_queries import HOOKS, D, build


def address(draw: random.Random) -> tuple[str, str]:
    """Return the kind of a request and its address."""
    hook, unit, share = quote(draw.choice(HOOKS)), draw.randrange(D), draw.random()
    if share < 0.5:
        return "unit", f"/unit?hook={hook}&unit={unit}"
    if share < 0.65:
        return "units", f"/units?hook={hook}&sort=kurtosis&first={50 * draw.randrange(20)}"
    if share < 0.7:
        return "search", f"/search?hook={hook}&q=w{draw.randrange(4096)}"
    if share < 0.8:
        return "console", "/sql"
    if share < 0.9:
        return "API", f"/api/unit?hook={hook}&unit={unit}"
    return "home", "/"


def memory(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor(pid: int) -> float:
    """Return the processor time that a process has taken, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(base: str, n_users: int, n_requests: int, pause: float, pid: int) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    faults: list[str] = []
    sizes: list[float] = []
    left = n_requests

    async def user(seed: int) -> None:
        nonlocal left
        draw = random.Random(seed)
        async with httpx.AsyncClient(base_url=base, timeout=120) as client:
            while left > 0:
                left -= 1
                if left % max(1, n_requests // 5) == 0:
                    sizes.append(memory(pid))
                kind, path = address(draw)
                began = time.perf_counter()
                try:
                    answer = await client.get(path)
                    if answer.status_code != 200:
                        faults.append(f"{answer.status_code} {path}")
                except httpx.HTTPError as fault:
                    faults.append(f"{type(fault).__name__} {path}")
                times[kind].append(1e3 * (time.perf_counter() - began))
                if pause:
                    await asyncio.sleep(draw.expovariate(1 / pause))

    began, used = time.perf_counter(), processor(pid)
    await asyncio.gather(*(user(seed) for seed in range(n_users)))
    wall, used = time.perf_counter() - began, processor(pid) - used
    print(f"{n_users} users, {pause:g} s between pages")
    every = sorted(each for some in times.values() for each in some)
    for kind, some in {**times, "all": every}.items():
        some = sorted(some)
        print(
            f"| {kind} | {len(some)} | {statistics.median(some):.0f} | "
            f"{some[int(0.95 * len(some))]:.0f} | {some[-1]:.0f} |"
        )
    print(f"{len(faults)} failed {faults[:3]}; {len(every) / wall:.1f} requests per second")
    print(f"processor time of the server per request: {1e3 * used / len(every):.1f} ms")
    print(f"memory of the server, MB: {', '.join(f'{size:.0f}' for size in sizes)}")
    print(f"load of the machine {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--acts", type=int, default=10, help="millions")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--pause", type=float, default=2.0, help="mean seconds between pages")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        store = build(options.folder or Path(made), options.acts)
        command = [sys.executable, "-m", "lmmono", "serve", str(store), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                found = re.search(r"http://\S+", server.stdout.readline())
                assert found is not None, "the server did not start"
                asyncio.run(
                    ask(found[0], options.users, options.requests, options.pause, server.pid)
                )
            finally:
                server.terminate()


if __name__ == "__main__":
    main()

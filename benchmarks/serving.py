"""A picture server in forty lines, and how long requests take when many come at once.

    pip install 'ray[serve]'
    serve run benchmarks.serving:app     # then: curl 'localhost:8000/?prompt=a+cat&budget=0.4' -o cat.png
    python -m benchmarks.serving         # 50 requests in flight, latency by budget

Requests that wait at the same time share one call of the pipeline, whatever their prompts, seeds and budgets;
the rest is the Python interface of docs/cli.md.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from ray import serve

import edit_cli

BATCH, WAIT = 8, 0.02
"""Most requests of a call, and the seconds that the first of them waits for others."""


@serve.deployment(max_ongoing_requests=64)
class Painter:
    """Pictures as PNG. One replica for each card: `Painter.options(num_replicas=4, ...)`."""

    def __init__(self, model: str) -> None:
        self.model = model
        edit_cli.generate("warm up", model=model, budget=0.1)  # loads

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT)
    async def draw(self, wishes: list[dict[str, Any]]) -> list[bytes]:
        """wishes: {"prompt": ..., "seed": ..., "budget": ...}, as in JSON lines of --prompts."""
        made = await asyncio.to_thread(edit_cli.generate, wishes, model=self.model, batch_size=BATCH)
        return [_png(each.value) for each in made]

    async def __call__(self, request: Any) -> Any:
        """Answers GET /?prompt=a+cat&budget=0.4&seed=7."""
        from starlette.responses import Response

        asked = dict(request.query_params)
        wish = {"prompt": asked["prompt"], "seed": int(asked.get("seed", 0))}
        return Response(
            await self.draw({**wish, "budget": float(asked.get("budget", 0.6))}), media_type="image/png"
        )


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


app = Painter.bind("qwen-image-tiny")


async def load(
    handle: Any, budgets: Sequence[float], in_flight: int, requests: int
) -> dict[float, list[float]]:
    """Seconds of every request by budget. Budgets take turns; so many requests are always under way."""
    seconds: dict[float, list[float]] = {budget: [] for budget in budgets}
    slots = asyncio.Semaphore(in_flight)

    async def one(number: int) -> None:
        budget = budgets[number % len(budgets)]
        async with slots:
            start = time.perf_counter()
            await handle.draw.remote({"prompt": "a cat", "seed": number, "budget": budget})
            seconds[budget].append(time.perf_counter() - start)

    await asyncio.gather(*(one(number) for number in range(requests)))
    return seconds


def main() -> None:
    """Load the server on this machine; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.4, 0.6, 1.0])
    parser.add_argument("--in-flight", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200, help="for each budget")
    args = parser.parse_args()
    handle = serve.run(app)
    rows = []
    print("| budget | requests a second | median, s | 95th percentile, s |\n|---|---|---|---|")
    for budget in [*args.budgets, None]:
        mix = args.budgets if budget is None else [budget]
        start = time.perf_counter()
        seconds = asyncio.run(load(handle, mix, args.in_flight, args.requests))
        rate = args.requests / (time.perf_counter() - start)
        for each, taken in seconds.items():
            cuts = statistics.quantiles(taken, n=20)
            name = f"{each:g}" if budget is not None else f"{each:g}, all together"
            rows.append(
                {"budget": each, "mixed": budget is None, "rate": rate, "median": cuts[9], "p95": cuts[18]}
            )
            print(f"| {name} | {rate:.1f} | {cuts[9]:.2f} | {cuts[18]:.2f} |", flush=True)
    print(json.dumps(rows))
    serve.shutdown()


if __name__ == "__main__":
    main()

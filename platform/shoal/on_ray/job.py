"""What the jobs that train have in common: options, and the way from a plan to a model with a router."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from shoal.errors import exit_code
from shoal.on_ray.train import parse_workers, train
from shoal.train import routing
from shoal.train.log import Console
from shoal.train.plan import FitPlan
from shoal.train.settings import merged
from shoal.train.trackers import together, trackers


def job_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a job's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_training_job(parser: argparse.ArgumentParser, make_plan: Callable[..., FitPlan]) -> int:
    """Read the options of `parser` and those of every training job, train by the plan that `make_plan` makes of them, and fit
    the router. Returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    add = parser.add_argument
    add("--minutes", type=float, help="end after this much training")
    add("--tokens", type=int, help="end after this many tokens")
    add("--epochs", type=float, help="end after this many passes over the data")
    add("--steps", type=int, help="end after this many updates")
    add("--accumulate", type=int, help="micro-batches that a worker merges into an update (default: the stage's)")
    add("--batch-tokens", type=int, help="tokens in an update (default: the stage's)")
    add("--learning-rate", type=float, help="highest learning rate (default: the stage's)")
    add("--seed", type=int, help="of fresh weights and of the order of the data (default 0)")
    add("--resume", choices=("auto", "never"), default="auto", help="never: begin again (default auto)")
    add("--workers", default="1", help="processes that train together: N, or MIN:MAX (default 1)")
    add("--cpus-per-worker", type=float, default=1.0, help="logical CPUs that each reserves (default 1)")
    gpu = "one GPU a worker (default: where the cluster has them now)"
    add("--gpu", action=argparse.BooleanOptionalAction, help=gpu)
    add("--mirror", help="folder or s3://BUCKET/PREFIX that checkpoints are copied to as well, and fetched from")
    add("--track", action="append", default=[], help="tensorboard, mlflow or wandb, to show the run in; repeat")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of TrainConfig or of the run; repeat")
    options = vars(parser.parse_args())
    texts, track, workers = (options.pop(key) for key in ("set", "track", "workers"))
    how = {"cpus_per_worker": options.pop("cpus_per_worker"), "gpus": options.pop("gpu")}

    def work() -> None:
        plan = make_plan(**merged(options, texts))
        more = trackers(track, plan.run, plan.name)
        with Console(plan.name) as console:
            train(plan, workers=parse_workers(workers), **how, on_progress=together(console, *more))
        routing.finish(plan.model_dir, plan.router_data, lambda line: print(line, flush=True))

    return exit_code(work)

"""What every worker does: it answers one line of JSON with another, and times one model."""
import json
import math
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def serve(
    make: Callable[[dict], Any],  # job -> an object with `describe` and a method `do_X` for each command X
) -> None:
    "Make a worker of the job in the first argument, and do what standard input says until it ends."
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where errors go

    def say(reply: dict) -> None:
        print(json.dumps(reply), file=out, flush=True)

    try:
        worker = make(json.loads(sys.argv[1]))
        say(worker.describe())
        for line in sys.stdin:
            command = json.loads(line)
            say(getattr(worker, "do_" + command.pop("do"))(**command))
    except Exception as error:  # noqa: BLE001 (whatever it is, the harness says it in one line)
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}".split("\n")[0]})
        raise SystemExit(1) from None


class ModelWorker:
    "One model, one optimizer, and rows to train on; subclasses say which."
    dynamic: bool | None = None  # how torch.compile is asked

    def __init__(
        self,
        job: dict,  # shape, device, precision, compile, seed; for training also rows, batch, and settings of the optimizer
    ):
        self.job, self.device, self.position, self.same_weights = job, torch.device(job["device"]), 0, False
        self.spent, self.steps = 0.0, 0
        self.dtype = getattr(torch, job["precision"])
        self.autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)
        torch.manual_seed(job.get("seed", 0))
        self.model = self.build(job["shape"]).to(self.device)
        if job.get("weights"):
            self.same_weights = self.load(load_file(job["weights"]))
        self.compute = torch.compile(self.model, dynamic=self.dynamic) if job.get("compile") else self.model
        self.rows = load_file(job["rows"]) if job.get("rows") else {}
        if self.rows:
            self.prepare_training()

    def build(self, shape: dict[str, int]) -> torch.nn.Module:
        "A model of these sizes, with weights as its makers draw them."
        raise NotImplementedError

    def load(self, weights: dict[str, Tensor]) -> bool:  # whether these are all that the model has
        "Take our weights."
        raise NotImplementedError

    def prepare_training(self) -> None:
        "Make the optimizer, and whatever brings batches."
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        "The loss in nats: a number, or one for each token."
        raise NotImplementedError

    def update(self, step: int, progress: float) -> None:
        "One optimizer step; progress, 0 to 1, is the part of the training that is behind us."
        raise NotImplementedError

    def write(self, prompt: list[int], batch: int, new: int, note: Callable[[int], None]) -> None:
        "Continue a prompt `batch` times, always with the likeliest token; `note` is called with each token of the first row."
        raise NotImplementedError

    def describe(self) -> dict:
        "What is to be known before the first step."
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "flops": self.flops(), "same_weights": self.same_weights}

    def flops(self) -> int:  # of training, a token
        "Six for each weight that multiplies, and attention at full length."
        s = self.job["shape"]
        matrices = sum(p.numel() for p in self.model.parameters()) - s["vocab_size"] * s["width"]
        return 6 * matrices + 12 * s["depth"] * s["width"] * s["context"]

    def clock(self) -> float:  # seconds
        "The time, after all that was asked of the device is done."
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    def forget_memory(self) -> None:
        "Let `memory` begin anew, where the system can."
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")

    def memory(self) -> int:  # bytes
        "The most memory used so far, of the GPU where there is one."
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status")
        if status.exists():  # getrusage would count what the process that started this one had
            return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def batch(self) -> tuple[Tensor, Tensor]:  # x, y (B, T)
        "The next rows, from the start again when they are used up."
        rows, size = self.rows["train"], self.job["batch"]
        ids = rows[torch.arange(self.position, self.position + size) % len(rows)].long()
        self.position += size
        return ids[:, :-1].contiguous().to(self.device), ids[:, 1:].contiguous().to(self.device)

    def gradients(self, x: Tensor, y: Tensor) -> Tensor:  # the mean loss
        "Forward and backward."
        with self.autocast:
            loss = self.forward(x, y)
        loss.backward()
        return loss.detach()

    def step(self, number: int = 0, progress: float = 0.0) -> float:  # the loss
        "All of a training step."
        loss = self.gradients(*self.batch())
        self.update(number, progress)
        return float(loss)

    def do_warmup(self) -> dict:
        "The first steps: what compiles, compiles now."
        start = self.clock()
        loss, first = self.step(), self.clock() - start
        for _ in range(2):
            self.step()
        return {"loss": loss, "first step s": first}

    def do_steps(self, count: int) -> dict:
        "Seconds of `count` whole steps, and of the parts of as many more; medians."
        self.step()  # one that doesn't count: what lay idle while others worked has to come back into caches and memory
        self.forget_memory()
        times: dict[str, list[float]] = {name: [] for name in ("step", "data", "forward", "backward", "optimizer")}
        for _ in range(count):
            start = self.clock()
            self.step()
            times["step"].append(self.clock() - start)
        for _ in range(count):
            marks = [self.clock()]
            x, y = self.batch()
            marks.append(self.clock())
            with self.autocast:
                loss = self.forward(x, y)
            marks.append(self.clock())
            loss.backward()
            marks.append(self.clock())
            self.update(0, 0.0)
            marks.append(self.clock())
            for name, a, b in zip(list(times)[1:], marks, marks[1:]):
                times[name].append(b - a)
        return {name: statistics.median(values) for name, values in times.items()} | {"memory": self.memory()}

    @torch.inference_mode()
    def do_decode(self, length: int, batch: int, new: int) -> dict:
        "Seconds to the first token and of each later one, and what the first row says."
        self.forget_memory()
        prompt = [(7 * i + 1) % self.job["shape"]["vocab_size"] for i in range(length)]
        marks, said = [self.clock()], []

        def note(token: int) -> None:
            marks.append(self.clock())
            said.append(token)

        self.model.eval()
        with self.autocast:
            self.write(prompt, batch, new, note)
        assert len(said) == new, f"{len(said)} tokens instead of {new}"
        return {"first": marks[1] - marks[0], "later": (marks[-1] - marks[1]) / (new - 1), "said": said, "memory": self.memory()}

    def do_train(self, budget: float, turn: float) -> dict:
        "Train for a turn, by a clock that starts after two steps and stops between turns; `budget` and `turn` in seconds."
        self.model.train()
        end = min(budget, self.spent + turn)
        while self.spent < end:
            start = self.clock()
            self.step(self.steps, self.spent / budget)
            self.spent += self.clock() - start if self.steps >= 2 else 0.0
            self.steps += 1
        return {"done": self.spent >= budget}

    def do_evaluate(self) -> dict:
        "What has been learned, of held-out text."
        return {"steps": self.steps, "bits per byte": self.bits_per_byte(), "memory": self.memory()}

    @torch.no_grad()
    def bits_per_byte(self) -> float:
        "Bits for each byte of the held-out rows."
        self.model.eval()
        nats, total, size = 0.0, 0, self.job["batch"]
        lengths = self.rows["bytes"].to(self.device)
        for start in range(0, len(self.rows["val"]) // size * size, size):
            ids = self.rows["val"][start : start + size].long().to(self.device)
            counted = self.rows["counted"][start : start + size, 1:].to(self.device)
            x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            with self.autocast:
                losses = self.forward(x, y, reduction="none").view_as(y)
            size_of = lengths[y] * counted
            nats += float((losses.double() * (size_of > 0)).sum())
            total += int(size_of.sum())
        return nats / math.log(2) / total


def cooldown(
    progress: float,  # 0 to 1
    part: float,  # of the training, at its end, in which the rate falls
    last: float = 0.0,  # what it falls to
) -> float:  # multiplies the learning rate
    "Constant, then falling in a straight line."
    left = min(1.0, (1 - progress) / part)
    return left + (1 - left) * last

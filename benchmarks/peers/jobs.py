"""The twins, timed: FuxiCTR's training step and inference, at their best.

The step is that of its public `BaseModel`: cross-entropy of the sigmoid, its regulariser over whole
tables, gradients clipped at norm 10, dense Adam. Batches stand ready as int64 tensors; all cores;
the faster of PyTorch's two CPU Adams is found by trying. `autocast`: forward pass in bfloat16,
which FuxiCTR does not ship. Behaves publicly (`ours=False`) where `attention` says so.
"""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fuxictr.pytorch.torch_utils import get_regularizer
from torch import nn
from torch.nn import functional

from benchmarks.peers import models, weights
from benchmarks.peers.features import Inputs, inputs
from loopfm_jax.bench.protocol import Measured, Spec, timed, timed_each
from loopfm_jax.data.schema import Schema

Ready = list[tuple[Inputs, torch.Tensor]]
REQUESTS = 16
MOST = 32
"""Batches that stand ready."""


class Subject:
    """A twin with our weights, on the spec's device."""

    def __init__(self, spec: Spec):
        torch.set_num_threads(len_cores())
        self.schema = Schema.from_json(spec["schema"])
        self.batch, self.autocast = spec["batch"], bool(spec.get("autocast"))
        self.device = torch.device("cuda" if spec.get("platform") == "gpu" else "cpu")
        config: Any = SimpleNamespace(**spec["backbone"])
        config.tables = SimpleNamespace(**spec["backbone"]["tables"])
        self.twin = models.make(self.schema, config, ours=False)
        weights.copy(read_tree(Path(spec["weights"])), self.twin, self.schema)
        self.twin.to(self.device)
        self._log = Path(spec["log"])
        # torch's GRU keeps no state over padding, so DIEN's stands behind (`attention.DIEN`).
        self._behind = config.name == "dien"
        self.facts: dict[str, Any] = {
            "params": sum(p.numel() for p in self.twin.parameters() if p.requires_grad),
            "threads": torch.get_num_threads(),
            "batch": self.batch,
        }

    def batches(self, size: int, *, most: int = MOST) -> Ready:
        """Of so many examples, ready as tensors."""
        with np.load(self._log, allow_pickle=False) as file:
            log = {name: file[name] for name in file.files}
        fields = [f.name for f in self.schema.categorical]
        ids = {name: log["ids"][:, [i]] for i, name in enumerate(fields)}
        for f in self.schema.sequences:
            values, lengths = log[f"values/{f.name}"], log[f"lengths/{f.name}"]
            ids[f.name] = padded(values, lengths, length=f.length, behind=self._behind)
        found: Ready = []
        for start in range(0, len(log["label"]) - size + 1, size):
            if len(found) == most:
                break
            at = slice(start, start + size)
            own = inputs(self.schema, {n: x[at] for n, x in ids.items()}, log["floats"][at])
            label_B = torch.as_tensor(log["label"][at], dtype=torch.float32)
            on_device = {name: x.to(self.device) for name, x in own.items()}
            found.append((on_device, label_B.to(self.device)))
        return found

    def logits(self, features: Inputs) -> torch.Tensor:
        """Float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.twin(features).float()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Train:
    """FuxiCTR's training step."""

    def __init__(self, spec: Spec):
        self._of, optim = Subject(spec), spec.get("optim", {})
        self._ready = self._of.batches(self._of.batch)
        self.facts = self._of.facts
        self._of.twin.train()
        self._clip = optim.get("clip_norm", 10.0)
        self._regularisers = get_regularizer(optim.get("embedding_l2", 0.0))
        self._trained = [p for p in self._of.twin.parameters() if p.requires_grad]
        self._tables = [p for p in self._tables_of(self._of.twin) if p.requires_grad]
        rate = optim.get("learning_rate", 1e-3)
        self._optimiser = torch.optim.Adam(self._trained, lr=rate, eps=1e-8)
        self._losses: list[float] = []
        self._done = 0
        self._runs, self._fused = 0, False

    def run(self, *, seconds: float, steps: int) -> Measured:
        of = self._of
        found = timed(
            self._one, of.wait, seconds=seconds, steps=steps, examples=of.batch, losses=self._losses
        )
        self._runs += 1
        if self._runs == 2:  # the first is compared by its losses, beside others that start
            self._choose()
        return replace(found, more={"fused_adam": float(self._fused)})

    def _one(self) -> None:
        features, label_B = self._ready[self._done % len(self._ready)]
        self._done += 1
        self._optimiser.zero_grad()
        probability_B = torch.sigmoid(self._of.logits(features))
        loss = functional.binary_cross_entropy(probability_B, label_B)
        (loss + self._penalty()).backward()
        nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimiser.step()
        self._losses.append(loss.item())

    def _penalty(self) -> Any:
        return sum(
            (weight / power) * torch.norm(table, power) ** power
            for power, weight in self._regularisers
            for table in self._tables
        )

    @staticmethod
    def _tables_of(twin: nn.Module) -> list[nn.Parameter]:
        """What FuxiCTR regularises: all inside its `FeatureEmbeddingDict`s, once each."""
        found = {
            id(p): p
            for module in twin.modules()
            if type(module).__name__ == "FeatureEmbeddingDict"
            for p in module.parameters()
        }
        return list(found.values())

    def _choose(self) -> None:
        """Keeps the faster Adam, by the update alone, on the gradients that are there."""
        took = {}
        for fused in (False, True, False, True):
            for group in self._optimiser.param_groups:
                group["fused"] = fused
            started = time.perf_counter()
            self._optimiser.step()
            self._of.wait()
            took[fused] = min(took.get(fused, np.inf), time.perf_counter() - started)
        self._fused = took[True] < took[False]
        for group in self._optimiser.param_groups:
            group["fused"] = self._fused


class Infer:
    """Batches one after the other, of a twin that only predicts."""

    def __init__(self, spec: Spec):
        self._of = serving(spec)
        self.facts = self._of.facts
        self._ready = self._of.batches(self._of.batch)
        self._losses: list[float] = []
        self._done = 0

    def run(self, *, seconds: float, steps: int) -> Measured:
        of = self._of
        return timed(
            self._one, of.wait, seconds=seconds, steps=steps, examples=of.batch, losses=self._losses
        )

    def _one(self) -> None:
        features, label_B = self._ready[self._done % len(self._ready)]
        self._done += 1
        self._losses.append(predict(self._of, features, label_B))


class Latency:
    """Requests of one batch each, from tensors to probabilities in numpy."""

    def __init__(self, spec: Spec):
        self._of = serving(spec)
        self.facts = self._of.facts
        self._ready = {size: self._of.batches(size, most=REQUESTS) for size in spec["batches"]}
        self._done = dict.fromkeys(spec["batches"], 0)

    def run(self, *, seconds: float, steps: int, batch: int) -> Measured:
        losses: list[float] = []
        one = partial(self._one, batch, losses)
        found = timed_each(one, seconds=seconds, steps=steps, examples=batch)
        return replace(found, losses=tuple(losses))

    def _one(self, size: int, losses: list[float]) -> None:
        features, label_B = self._ready[size][self._done[size] % REQUESTS]
        if self._done[size] < REQUESTS:
            losses.append(predict(self._of, features, label_B))
        else:
            with torch.inference_mode():
                torch.sigmoid(self._of.logits(features)).cpu().numpy()
        self._done[size] += 1


def serving(spec: Spec) -> Subject:
    """A twin that only predicts."""
    of = Subject(spec)
    of.twin.eval()
    return of


def predict(of: Subject, features: Inputs, label_B: torch.Tensor) -> float:
    """Mean cross-entropy of the probabilities of a batch."""
    with torch.inference_mode():
        probability_B = torch.sigmoid(of.logits(features))
        return functional.binary_cross_entropy(probability_B, label_B).item()


def padded(values: np.ndarray, lengths: np.ndarray, *, length: int, behind: bool) -> np.ndarray:
    """Ragged values as int32 [rows, length], padded with 0 in front or behind."""
    found = np.zeros((len(lengths), length), np.int32)
    real = np.arange(length) < lengths[:, None]
    found[real if behind else real[:, ::-1]] = values
    return found


def read_tree(path: Path) -> dict[Any, Any]:
    """Arrays by path (`dnn/layers/0/kernel`) as nested dicts; numbers are list positions."""
    tree: dict[Any, Any] = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            *parents, leaf = (int(k) if k.isdigit() else k for k in name.split("/"))
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[leaf] = file[name]
    return tree


def len_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

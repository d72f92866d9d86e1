"""The flow: every stage of an experiment as a folder of its working directory.

    data -> fm/teacher -> fm/export -> history -> vm/<method>/seed_<n> -> report.*

Each function makes one stage unless it is up to date, and returns its manifest. This is the only
place where FM and VM are in one room; they meet through what is on disk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loopfm_jax import stages
from loopfm_jax.config import Config, as_json
from loopfm_jax.data.log import load
from loopfm_jax.data.prepare import prepare
from loopfm_jax.fm.export import export
from loopfm_jax.fm.train import Labels, train_fm
from loopfm_jax.history.store import structure
from loopfm_jax.progress import say
from loopfm_jax.sharding import make_mesh
from loopfm_jax.stages import Report, Stage
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.train import Histories, open_examples, train_vm


@dataclass(frozen=True)
class Flow:
    """An experiment's folders. `labels = shuffled` is the control whose FM learns nothing true."""

    config: Config
    labels: Labels = "true"

    @property
    def root(self) -> Path:
        return self.config.workdir

    @property
    def _branch(self) -> Path:
        return self.root if self.labels == "true" else self.root / "controls" / "shuffled-labels"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def teacher(self) -> Path:
        return self._branch / "fm" / "teacher"

    @property
    def exported(self) -> Path:
        return self._branch / "fm" / "export"

    @property
    def history(self) -> Path:
        return self._branch / "history"

    def judged(self, branch: Path) -> Path:
        """Where VMs and reports go: a choice made on the validation window has its own folder."""
        return branch if self.config.holdout == "test" else branch / "validation"

    def vm(self, method: str, seed: int, histories: Histories = "own") -> Path:
        branch = self._branch if histories == "own" else self.root / "controls/swapped-histories"
        return self.judged(branch) / "vm" / method / f"seed_{seed}"

    def prepare(self) -> Report:
        source = self.config.data
        stage = Stage(
            "prepare",
            self.data,
            {"data": as_json(source)},
            sources=source.fingerprint(),
        )

        def work(directory: Path) -> Report:
            say(f"prepare: reading {source.name}")
            raw = source.read()
            return prepare(
                raw,
                source.windows,
                name=source.name,
                card=source.card,
                directory=directory,
            )

        return self._run(stage, work)

    def train_fm(self) -> Report:
        config = self.config
        stage = Stage(
            "train-fm",
            self.teacher,
            {"fm": as_json(config.fm), "seed": config.seed, "labels": self.labels},
            inputs={"data": self.data},
            resumable=True,
        )

        def work(directory: Path) -> Report:
            return train_fm(
                self.data,
                config.fm,
                mesh=make_mesh(config.mesh),
                seed=config.seed,
                directory=directory,
                labels=self.labels,
            )

        return self._run(stage, work)

    def export(self) -> Report:
        config = self.config
        stage = Stage(
            "export",
            self.exported,
            {"export": as_json(config.export)},
            inputs={"data": self.data, "teacher": self.teacher},
        )

        def work(directory: Path) -> Report:
            return export(
                self.data,
                self.teacher,
                config.export,
                config.fm,
                mesh=make_mesh(config.mesh),
                directory=directory,
            )

        return self._run(stage, work)

    def structure(self) -> Report:
        config = self.config
        told = as_json(config.history)
        del told["side"]  # what the VM is told does not change the store
        stage = Stage(
            "structure",
            self.history,
            {"history": told},
            inputs={"data": self.data, "export": self.exported},
        )

        def work(directory: Path) -> Report:
            log, splits = load(self.data)
            rows = slice(splits["vm"].start, splits["test"].stop)
            exported = stages.verify(self.exported)["facts"]
            arrays = {
                name: np.load(self.exported / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("codes", "soft")
            }
            facts = structure(
                **arrays,
                key=log["key"][rows],
                time=log["time"][rows],
                logged_time=log["logged_time"][rows],
                outcome=log["label"][rows],
                config=config.history,
                directory=directory,
            )
            kept = {name: exported[name] for name in ("code", "width", "cutoff_ms")}
            return facts | kept | {"longest": config.history.length}

        return self._run(stage, work)

    def train_vm(self, method: str, seed: int, histories: Histories = "own") -> Report:
        config = self.config
        found = find_method(method, side=config.history.side)
        stage = Stage(
            "train-vm",
            self.vm(method, seed, histories),
            {
                "vm": as_json(config.vm),
                "method": method,
                "side": list(found.side),
                "seed": seed,
                "histories": histories,
                "holdout": config.holdout,
            },
            inputs={"data": self.data, "history": self.history},
            resumable=True,
        )

        def work(directory: Path) -> Report:
            facts = stages.verify(self.history)["facts"]
            examples = open_examples(
                self.data,
                self.history,
                facts,
                config.vm,
                found,
                histories=histories,
            )
            return train_vm(
                examples,
                facts,
                config.vm,
                mesh=make_mesh(config.mesh),
                seed=seed,
                holdout=config.holdout,
                directory=directory,
                title=f"train-vm {method} seed {seed}",
            )

        return self._run(stage, work)

    def _run(self, stage: Stage, work: Callable[[Path], Report]) -> Report:
        manifest, done = stages.run(stage, work, force=self.config.force)
        name = stage.directory.relative_to(self.root)
        seconds = manifest["measured"]["seconds"]
        say(f"{name}: {'done in' if done else 'up to date, took'} {seconds:.1f} s")
        return manifest

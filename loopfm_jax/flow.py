"""The flow: every stage of an experiment as a folder of its working directory.

    data -> fm/teacher -> fm/export -> history -> vm/<method>/seed_<n> -> report.*

Each function makes one stage unless it is up to date, and returns its manifest. This is the only
place where FM and VM are in one room; they meet through what is on disk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loopfm_jax import stages
from loopfm_jax.config import Config, as_json
from loopfm_jax.data.log import load
from loopfm_jax.data.prepare import prepare
from loopfm_jax.fm.export import export
from loopfm_jax.fm.train import train_fm
from loopfm_jax.history.keys import key_values
from loopfm_jax.history.store import open_export, structure
from loopfm_jax.progress import say
from loopfm_jax.sharding import make_mesh
from loopfm_jax.stages import Report, Stage
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.train import open_examples, train_vm

Teacher = Literal["fm", "shuffled-labels", "first-round", "self"]
"""Whose codes: the FM's; those of one that learned nothing true (a control); of the first of two
rounds, whose FM sees half of the FM window; of the second, whose FM reads the first one's codes."""
FOLDERS = {
    "fm": ".",
    "shuffled-labels": "controls/shuffled-labels",
    "first-round": "self/first_round",
    "self": "self",
}
Histories = Literal["own", "swapped"]


@dataclass(frozen=True)
class Flow:
    """An experiment's folders, for one of its teachers."""

    config: Config
    taught_by: Teacher = "fm"

    @property
    def root(self) -> Path:
        return self.config.workdir

    @property
    def branch(self) -> Path:
        return self.root / FOLDERS[self.taught_by]

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def teacher(self) -> Path:
        return self.branch / "fm" / "teacher"

    @property
    def exported(self) -> Path:
        return self.branch / "fm" / "export"

    @property
    def history(self) -> Path:
        return self.branch / "history"

    def of(self, teacher: Teacher) -> "Flow":
        return Flow(self.config, teacher)

    def for_method(self, method: str) -> "Flow":
        """The flow whose histories a method reads."""
        return self.of(find_method(method).teacher)

    @property
    def read_by_teacher(self) -> Path | None:
        """The histories that the teacher itself reads."""
        return self.of("first-round").history if self.taught_by == "self" else None

    def judged(self, branch: Path) -> Path:
        """Where VMs and reports go: a choice made on the validation window has its own folder."""
        return branch if self.config.holdout == "test" else branch / "validation"

    def vm(self, method: str, seed: int, histories: Histories = "own") -> Path:
        branch = self.branch if histories == "own" else self.root / "controls/swapped-histories"
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
        told: dict[str, Any] = {
            "labels": "shuffled" if self.taught_by == "shuffled-labels" else "true",
            "span": "first-half" if self.taught_by == "first-round" else "whole",
        }
        stage = Stage(
            "train-fm",
            self.teacher,
            {"fm": as_json(config.fm), "seed": config.seed, **told},
            inputs={"data": self.data, **self._read_by_teacher},
            resumable=True,
        )

        def work(directory: Path) -> Report:
            return train_fm(
                self.data,
                config.fm,
                mesh=make_mesh(config.mesh),
                seed=config.seed,
                directory=directory,
                history=self.read_by_teacher,
                **told,
            )

        return self._run(stage, work)

    def export(self) -> Report:
        config = self.config
        stage = Stage(
            "export",
            self.exported,
            {"export": as_json(config.export), "seed": config.seed},
            inputs={"data": self.data, "teacher": self.teacher, **self._read_by_teacher},
        )

        def work(directory: Path) -> Report:
            return export(
                self.data,
                self.teacher,
                config.export,
                config.fm,
                seed=config.seed,
                mesh=make_mesh(config.mesh),
                directory=directory,
                history=self.read_by_teacher,
            )

        return self._run(stage, work)

    @property
    def _read_by_teacher(self) -> Mapping[str, Path]:
        return {"history": self.read_by_teacher} if self.read_by_teacher else {}

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
            log, _ = load(self.data)
            exported = open_export(self.exported, stages.verify(self.exported)["facts"])
            rows = slice(exported.facts["first"], len(log))
            keys = key_values(log, config.history.keys)
            return structure(
                exported,
                {name: key[rows] for name, key in keys.items()},
                time=log["time"][rows],
                logged_time=log["logged_time"][rows],
                outcome=log["label"][rows],
                config=config.history,
                directory=directory,
            )

        return self._run(stage, work)

    def teach(self) -> None:
        """Everything between the prepared log and the VMs."""
        if self.taught_by == "self":
            self.of("first-round").teach()
        for stage in (self.train_fm, self.export, self.structure):
            stage()

    def train_vm(self, method: str, seed: int, histories: Histories = "own") -> Report:
        config = self.config
        found = find_method(method, side=config.history.side)
        inputs = {"data": self.data, "history": self.history}
        if found.features or "fitnets" in found.heads:
            inputs["export"] = self.exported
        stage = Stage(
            "train-vm",
            self.vm(method, seed, histories),
            {
                "vm": as_json(config.vm),
                "method": as_json(found),
                "seed": seed,
                "histories": histories,
                "holdout": config.holdout,
            },
            inputs=inputs,
            resumable=True,
        )

        def work(directory: Path) -> Report:
            examples = open_examples(
                self.data,
                self.history,
                self.exported,
                stages.verify(self.history)["facts"],
                config.vm,
                found,
                swap=histories == "swapped",
            )
            return train_vm(
                examples,
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

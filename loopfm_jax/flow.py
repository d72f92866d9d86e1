"""The flow: every stage of an experiment as a folder of its working directory.

    data -> fm/teacher -> fm/export -> history -> vm/<method>/seed_<n> -> report.*

Each function makes one stage unless it is up to date, and returns its manifest. This is the only
place where FM and VM are in one room; they meet through what is on disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from loopfm_jax import processes, stages
from loopfm_jax.config import Config, as_json
from loopfm_jax.data.beam_prepare import prepare_by_beam
from loopfm_jax.data.prepare import prepare
from loopfm_jax.fm.export import export
from loopfm_jax.fm.train import train_fm
from loopfm_jax.history.structure import structure_log
from loopfm_jax.identity import digest
from loopfm_jax.progress import say
from loopfm_jax.sharding import make_mesh
from loopfm_jax.stages import Report, Stage, Work
from loopfm_jax.vm.methods import find_method
from loopfm_jax.vm.train import Examples, Sources, open_examples, train_vm

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
SWAPPED = "controls/swapped-histories"


@dataclass(frozen=True)
class Flow:
    """An experiment's stages, for one of its teachers."""

    config: Config
    taught_by: Teacher = "fm"
    shared: bool = False
    """Name folders by what they are made of, so that experiments of one working directory share
    every stage that they have in common (`loopfm study`)."""
    trial: str = ""
    """Folder of VMs that are configured otherwise than the rest (`auto`)."""
    redone: set[Path] = field(default_factory=set, compare=False)
    """Stages that `force` has redone, by this flow and those derived from it: once is enough."""

    @property
    def root(self) -> Path:
        return self.config.workdir

    def of(self, teacher: Teacher) -> "Flow":
        return replace(self, taught_by=teacher)

    def for_method(self, method: str) -> "Flow":
        """The flow whose histories a method reads."""
        return self.of(find_method(method).teacher)

    # Stages: folder, configuration, inputs

    def stage(self, command: str, folder: str, config: Mapping[str, Any], **more: Any) -> Stage:
        """A stage with its place in the working directory."""
        if not self.shared:
            directory = self.root / FOLDERS[self.taught_by] / folder
        else:
            inputs = {name: path.name for name, path in more.get("inputs", {}).items()}
            directory = self.root / command / digest({"config": config, "inputs": inputs})
        return Stage(command, directory, config, **more)

    @property
    def _prepare(self) -> Stage:
        return self.of("fm").stage("prepare", "data", {"data": as_json(self.config.data)})

    @property
    def data(self) -> Path:
        return self._prepare.directory

    @property
    def _train_fm(self) -> Stage:
        told = {
            "labels": "shuffled" if self.taught_by == "shuffled-labels" else "true",
            "span": "first-half" if self.taught_by == "first-round" else "whole",
        }
        return self.stage(
            "train-fm",
            "fm/teacher",
            {"fm": as_json(self.config.fm), "seed": self.config.seed, **told},
            inputs={"data": self.data, **self._read_by_teacher},
            resumable=True,
        )

    @property
    def teacher(self) -> Path:
        return self._train_fm.directory

    @property
    def _export(self) -> Stage:
        return self.stage(
            "export",
            "fm/export",
            {"export": as_json(self.config.export), "seed": self.config.seed},
            inputs={"data": self.data, "teacher": self.teacher, **self._read_by_teacher},
        )

    @property
    def exported(self) -> Path:
        return self._export.directory

    @property
    def _structure(self) -> Stage:
        told = as_json(self.config.history)
        for choice in ("side", "tap", "raw", "residency"):  # of the reader, not of the store
            del told[choice]
        return self.stage(
            "structure",
            "history",
            {"history": told},
            inputs={"data": self.data, "export": self.exported},
        )

    @property
    def history(self) -> Path:
        return self._structure.directory

    @property
    def _read_by_teacher(self) -> dict[str, Path]:
        """The histories that the teacher itself reads."""
        return {"history": self.of("first-round").history} if self.taught_by == "self" else {}

    def judged(self, branch: Path) -> Path:
        """Where VMs and reports go: a choice made on the validation window has its own folder."""
        return branch if self.config.holdout == "test" else branch / "validation"

    def _train_vm(self, method: str, seed: int, histories: Histories) -> Stage:
        config, found = self.config, find_method(method, side=self.config.history.side)
        inputs = {"data": self.data}
        if found.reads_export:
            inputs["export"] = self.exported
        if found.contents:
            inputs["history"] = self.history
        told = {
            "vm": as_json(config.vm),
            "method": as_json(found),
            "seed": seed,
            "histories": histories,
            "holdout": config.holdout,
            "tap": config.history.tap if inputs.keys() & {"export", "history"} else None,
            "raw": (config.history.raw or None) if "raw" in found.contents else None,
        }
        branch = Path(SWAPPED if histories == "swapped" else self.trial)
        folder = self.judged(branch) / "vm" / method
        return self.stage(
            "train-vm", str(folder / f"seed_{seed}"), told, inputs=inputs, resumable=True
        )

    def vm(self, method: str, seed: int, histories: Histories = "own") -> Path:
        return self._train_vm(method, seed, histories).directory

    # Making them

    def prepare(self) -> Report:
        source = self.config.data

        def work(directory: Path) -> Report:
            say(f"prepare: reading {source.name}")
            if self.config.pipeline:
                return prepare_by_beam(source, directory=directory, beam=self.config.pipeline)
            return prepare(
                source.read(),
                source.windows,
                name=source.name,
                card=source.card,
                directory=directory,
            )

        return self.make(replace(self._prepare, sources=processes.first(source.fingerprint)), work)

    def train_fm(self) -> Report:
        stage = self._train_fm

        def work(directory: Path) -> Report:
            return train_fm(
                self.data,
                self.config.fm,
                mesh=make_mesh(self.config.mesh),
                seed=self.config.seed,
                directory=directory,
                labels=stage.config["labels"],
                span=stage.config["span"],
                history=self._read_by_teacher.get("history"),
                residency=self.config.history.residency,
                log_residency=self.config.log_residency,
            )

        return self.make(stage, work, together=True)

    def export(self) -> Report:
        def work(directory: Path) -> Report:
            return export(
                self.data,
                self.teacher,
                self.config.export,
                self.config.fm,
                seed=self.config.seed,
                mesh=make_mesh(self.config.mesh),
                directory=directory,
                history=self._read_by_teacher.get("history"),
                residency=self.config.history.residency,
                log_residency=self.config.log_residency,
            )

        return self.make(self._export, work, together=True)

    def structure(self) -> Report:
        def work(directory: Path) -> Report:
            return structure_log(
                self.data,
                self.exported,
                stages.verify(self.exported)["facts"],
                config=self.config.history,
                directory=directory,
                beam=self.config.pipeline,
            )

        return self.make(self._structure, work)

    def teach(self) -> None:
        """Everything between the prepared log and the VMs."""
        if self.taught_by == "self":
            self.of("first-round").teach()
        for stage in (self.train_fm, self.export, self.structure):
            stage()

    def trained_vm(self, method: str, seed: int) -> Path | None:
        """The folder of a VM that was trained as configured; None if there is none at all.

        Raises:
          UserError: it was trained otherwise, or from something else than is there now.
        """
        stage = self._train_vm(method, seed, "own")
        if not (stage.directory / stages.MANIFEST).exists():
            return None
        stages.require(stage)
        return stage.directory

    def examples(self, method: str, seed: int, histories: Histories = "own") -> Examples:
        """What a VM is trained and judged on."""
        stage = self._train_vm(method, seed, histories)
        sources = Sources(
            self.data,
            stage.inputs.get("export"),
            stage.inputs.get("history"),
            tap=stage.config["tap"],
            raw=stage.config["raw"] or (),
            residency=self.config.history.residency,
            log_residency=self.config.log_residency,
            swap=histories == "swapped",
        )
        found = find_method(method, side=self.config.history.side)
        return open_examples(sources, self.config.vm, found)

    def train_vm(self, method: str, seed: int, histories: Histories = "own") -> Report:
        config = self.config

        def work(directory: Path) -> Report:
            return train_vm(
                self.examples(method, seed, histories),
                config.vm,
                mesh=make_mesh(config.mesh),
                seed=seed,
                holdout=config.holdout,
                directory=directory,
                title=f"train-vm {method} seed {seed}",
            )

        return self.make(self._train_vm(method, seed, histories), work, together=True)

    def make(self, stage: Stage, work: Work, *, together: bool = False) -> Report:
        """The manifest of a stage, which is made unless it is up to date."""
        force = self.config.force and stage.directory not in self.redone
        self.redone.add(stage.directory)
        manifest, done = stages.run(stage, work, force=force, together=together)
        name = stage.directory.relative_to(self.root)
        seconds = manifest["measured"]["seconds"]
        if done or not self.shared:
            say(f"{name}: {'done in' if done else 'up to date, took'} {seconds:.1f} s")
        return manifest

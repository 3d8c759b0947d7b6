"""`raylign run`: the stage graph, from data to the table at the end, in the order in which things happen."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.cluster import passed_on
from actors.errors import EXIT_DONE, EXIT_STOPPED, RunFailure, UserError
from pipeline.artifacts.hiding import hiding_problems
from pipeline.artifacts.manifest import full_disks, versions
from pipeline.artifacts.run_directory import RunDirectory, clear_stage, drop_previous
from pipeline.execution.parity import check_parity
from pipeline.execution.stop import REPORTING, StopRequests
from pipeline.monitoring.phases import phase
from pipeline.monitoring.progress import Progress
from pipeline.monitoring.replacements import Replacements
from pipeline.monitoring.summary import pairs_table, results_table, say_startup
from pipeline.monitoring.trackers import Trackers, open_trackers
from pipeline.report.while_running import ReportWhileRunning
from pipeline.rewards.kept_answers import FILE as KEPT_ANSWERS

if TYPE_CHECKING:
    from pipeline.artifacts.manifest import Manifest
    from pipeline.config.run_config import RunConfig
    from pipeline.execution.fleet import Fleet
    from pipeline.planning.nodes import Graph, Node
from pipeline.stages.context import WorkTime

GOES_ON = "The same command goes on from there."


def run(
    config: RunConfig,
    *,
    dry_run: bool = False,
    until: str | None = None,
    fresh: bool = False,
    stop: StopRequests | None = None,
) -> int:
    """Run a configuration; returns the exit code (0 done, 75 stopped after saving).

    `stop`: entered already, by a command that can be stopped while it reads its config.

    Raises:
        UserError: the config, the data, the base or the cluster can't be used; nothing was started.
        RunFailure: an actor failed, overran its deadline, or an invariant did not hold.
        KeyboardInterrupt: the second signal; nothing was saved.
    """
    from pipeline.planning.dry_run import DryRun

    if stop is None:
        with StopRequests(print) as stop:
            return run(config, dry_run=dry_run, until=until, fresh=fresh, stop=stop)
    began = time.monotonic()
    dry = DryRun.of(config) if dry_run else None
    if dry is not None:
        config = dry.config
    if problems := hiding_problems(config.functions(), Path.cwd()):
        raise UserError(problems)
    passed_on(config.ray.env)
    try:
        with _opened(config, stop, fresh=fresh or dry_run) as (directory, progress):
            if dry is not None:
                progress.table("Dry run: what is set differently", ["key", "yours", "here"], dry.changes)
                dry.write_twins()
            code = Run(config, directory, progress, stop, began, fresh).execute(until)
            if dry is not None and code == EXIT_DONE:
                progress.note(dry.outlook())
        return code
    except KeyboardInterrupt:  # While it looked at its directory.
        if not stop.cut:
            raise
        return EXIT_STOPPED


def evaluate_only(config: RunConfig) -> int:
    """`raylign eval`: score finished models of a run, without training anything.

    Raises:
        UserError: a model that was asked for is not finished, or was made with other settings.
        KeyboardInterrupt: as `run`.
    """
    with StopRequests(print) as stop:
        try:
            with _opened(config, stop) as (directory, progress):
                return Run(config, directory, progress, stop, time.monotonic()).execute(None, train=False)
        except KeyboardInterrupt:
            if not stop.cut:
                raise
            return EXIT_STOPPED


@contextlib.contextmanager
def _opened(
    config: RunConfig, stop: StopRequests, *, fresh: bool = False
) -> Iterator[tuple[RunDirectory, Progress]]:
    """Things that every run holds while it lasts; meanwhile `stop` prints where its progress does."""
    from pipeline.rewards.user_functions import functions_closed

    directory = RunDirectory(config.output_dir, config.name)
    with (
        directory.opened(fresh=fresh),
        full_disks(directory.path),
        Progress() as progress,
        functions_closed(),
    ):
        earlier, stop.say, stop.stop_file = stop.say, progress.note, directory.stop_file
        try:
            yield directory, progress
        finally:
            stop.say = earlier


class Run:
    """One execution of a graph: what is shared by its stages."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        progress: Progress,
        stop: StopRequests,
        began: float,
        fresh: bool = False,
    ) -> None:
        """`began`: when, by `time.monotonic`."""
        self.config, self.directory, self.progress, self.stop = config, directory, progress, stop
        self.began, self.fresh = began, fresh
        self.startup: dict[str, float] = {}
        self.graph: Graph | None = None
        self.trackers = Trackers({}, progress.note)
        self.replacements = Replacements(directory.path, progress.note)

    def execute(self, until: str | None, *, train: bool = True) -> int:
        """The whole graph: read, decide, start, train, evaluate, report."""
        from pipeline.execution.fleet import Fleet
        from pipeline.stages.context import Stopped

        code, note, replaced = EXIT_STOPPED, self.progress.note, self.replacements.add
        try:
            with (
                Fleet(self.config, self.directory, self.startup, self.fresh, note, replaced) as fleet,
                self.stop.ending(),
            ):
                self.graph = self.begin(fleet, until, train=train)
                self.work(self.graph, fleet)
            code = EXIT_DONE
        except Stopped as stopped:
            self.progress.note(f"stopped after saving: {stopped}. {GOES_ON}")
        except KeyboardInterrupt:
            if not self.stop.cut:
                raise
            self.progress.note(f"stopped; nothing was lost. {GOES_ON}")
        except Exception as failure:
            if self.graph is not None:
                what = str(failure) if isinstance(failure, RunFailure) else repr(failure)
                self.directory.record(error=what)
                self.close(self.graph)
            raise
        if self.graph is not None:
            self.close(self.graph)
        return code

    def seconds(self) -> float:
        """Since the command began."""
        return time.monotonic() - self.began

    def begin(self, fleet: Fleet, until: str | None, *, train: bool) -> Graph:
        """Read everything, decide what has to run, and have its first processes started."""
        from pipeline.data.tokens.template_date import date_notice
        from pipeline.planning.read_graph import read_graph, read_rows

        with _uncollected():
            phase("reading data")
            fleet.preload_imports()
            records = read_rows(self.config, until, fleet.machine_problems())
            self.startup["imports and data"] = round(self.seconds(), 2)
            fleet.prestart()
            facts, local = fleet.base_facts(), fleet.local
            graph = read_graph(self.config, self.directory, records, self.startup, facts, local)
        if not train:
            graph = graph.evaluations_only(self.config.eval_models())
        for node in graph.nodes:
            for name, problem in node.decision.damaged.items():
                self.progress.note(f"{node.name}: {name} is damaged and not gone on from: {problem}")
        self._write_config()
        self.directory.record(versions=versions(), error=None)
        if graph.pending:
            self.directory.record(began=time.time() - self.seconds())
        fleet.start(graph)
        if fleet.ray_line is not None:
            self.progress.note(fleet.ray_line)
        if graph.untested and graph.pending:
            phase("comparing an engine with the trainer")
            check_parity(self.config.model, fleet.engines(), fleet.engine_spec(), self.progress.note)
        if graph.template_date is not None:
            self.progress.note(date_notice(graph.template_date))
        if graph.pending and graph.lora_targets is not None:
            self.progress.note(f"LoRA trains\n{graph.lora_targets}")
        return graph

    def work(self, graph: Graph, fleet: Fleet) -> None:
        """Run the stages and evaluations.

        Raises:
            Stopped, KeyboardInterrupt: a stop was asked for.
        """
        from pipeline.execution.evaluations import Evaluations

        self.trackers = self._open_trackers()
        report = ReportWhileRunning(self.directory.path, self.progress.note)
        try:
            if graph.pending or graph.evaluations_pending:
                report.start()
            for node in graph.nodes:
                self.run_stage(node, fleet, graph.tokenizer)
            self.replacements.at("eval")
            Evaluations(self.config, self.directory, self.progress.note, self.stop).run(graph, fleet)
        finally:
            report.stop()

    def close(self, graph: Graph) -> None:
        """Report on the run, also on one that stopped or failed, when its processes are gone."""
        self.stop.finish(REPORTING)
        with contextlib.suppress(KeyboardInterrupt):
            self.trackers.close()
            if graph.pending:
                self.directory.record(startup=self.startup, seconds=round(self.seconds(), 1))
            self.report(graph)

    def run_stage(self, node: Node, fleet: Fleet, tokenizer: Any) -> None:
        """Skip, continue or run one stage; afterwards its artifact is on disk and in run.json."""
        from pipeline.stages.context import Stopped, WorkTime

        manifest = node.decision.manifest
        if node.decision.state == "fresh" and manifest is not None:
            self.progress.note(f"{node.name}: {node.decision.says}")
            self.directory.record_stage(
                node.name,
                state="skipped",
                seconds=round(manifest.seconds, 1),
                metrics=manifest.metrics,
                type=node.kind,
            )
            return
        self.stop.begin_at_once(f"no step of {node.name} has begun, so there is nothing to save")
        if node.decision.state in ("changed", "new"):
            # What services said to an attempt at the same work, they have said to this one.
            same = node.decision.state == "new" or bool(node.decision.damaged)
            clear_stage(node.directory, keep=[KEPT_ANSWERS] if same else [])
        self.progress.note(f"{node.name}: {node.decision.says}")
        for note in node.data_notes:
            self.progress.note(note)
        total = node.prepared.total_steps
        self.directory.record_stage(
            node.name, state="running", type=node.kind, init=node.init, total_steps=total
        )
        spent, waited = WorkTime(), self.directory.state["stages"][node.name].get("wait", 0.0)
        if node.decision.state != "partial":
            waited = 0.0
        self.progress.stage(node.name, total)
        began = manifest.step if manifest is not None and node.decision.state == "partial" else None
        self.replacements.at(node.name, (began or 0) + 1)
        try:
            with fleet.measuring(lambda line: self.progress.note(f"{node.name}: {line}")):
                manifest = self._train(node, fleet, tokenizer, spent)
        except BaseException as error:
            state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
            self.progress.done(state)
            seconds = {} if spent.work is None else {"seconds": round(spent.work, 1)}
            self.directory.record_stage(node.name, state=state, wait=round(waited + spent.wait, 1), **seconds)
            raise
        drop_previous(node.directory)
        if not node.spec.keep_warm:
            fleet.release()
        self.progress.done("done")
        self.directory.record_stage(
            node.name,
            state="done",
            seconds=round(manifest.seconds, 1),
            wait=round(waited + spent.wait, 1),
            metrics=manifest.metrics,
        )

    def _train(self, node: Node, fleet: Fleet, tokenizer: Any, spent: WorkTime) -> Manifest:
        """The stage itself, offline or online."""
        from pipeline.execution.contexts import Contexts, Events
        from pipeline.stages.offline.train import train
        from pipeline.stages.online.train import train_rl

        events = Events(self._on_step(fleet, node), self._on_log(node), self.stop, spent, self.progress.note)
        contexts = Contexts(fleet)
        stage = node.prepared
        if stage.online:
            online = contexts.rl_context(node, stage, events, tokenizer)
            phase("first step: weights to the engines, samples, update")
            return train_rl(stage, online, node.decision)
        reference = contexts.reference_feed(node)
        offline = contexts.train_context(node, reference, events)
        phase("first step")
        manifest = train(stage, offline, node.decision)
        if reference is not None and not self.stop.asked():
            reference.finish()
            for note in reference.notes():
                self.progress.note(f"{node.name}: {note}")
        return manifest

    def report(self, graph: Graph) -> None:
        """Print the table and write the report, also of a run that stopped or failed."""
        from pipeline.report import build_report

        phase("")
        results_table(self.progress, self.directory.state, list(graph.evaluations))
        pairs_table(
            self.progress, self.directory.state, [found.node.name for found in graph.pair_evaluations]
        )
        say_startup(self.progress, self.startup, self.seconds())
        if said := self.replacements.said():
            self.progress.note(said)
        try:
            self.progress.note(f"report: {build_report(self.directory.path)}")
        except OSError as error:
            self.progress.note(f"report not written: {error}")

    def _on_step(self, fleet: Fleet, node: Node) -> Any:
        def on_step(step: int, metrics: dict[str, Any]) -> None:
            if "first training step" not in self.startup:
                fleet.start_others()
                total = self.seconds()
                self.startup["adapter and first step"] = round(total - sum(self.startup.values()), 2)
                self.startup["first training step"] = round(total, 2)
            self.progress.step(step, metrics)
            self.replacements.at(node.name, step + 1)

        return on_step

    def _on_log(self, node: Node) -> Any:
        def on_log(line: dict[str, Any]) -> None:
            numbers = line | {"replacements": self.replacements.count}
            self.trackers.log(node.name, int(line["step"]), numbers)

        return on_log

    def _open_trackers(self) -> Trackers:
        return open_trackers(
            self.config.logging.report_to,
            run_name=self.config.name,
            run_dir=self.directory.path,
            config=self.config.model_dump(mode="json"),
            note=self.progress.note,
        )

    def _write_config(self) -> None:
        from pipeline.config.load import dump_config

        path: Path = self.directory.path / "config.yaml"
        path.write_text(dump_config(self.config))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles, while what is made stays to the end: imports, rows and their
    tokens. Looking for garbage among them took a fifth of the driver's time, and found none."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

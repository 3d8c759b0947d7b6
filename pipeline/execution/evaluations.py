"""Evaluations of a run: every model that the config asks for and that has no finished evaluation yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.monitoring.phases import phase

if TYPE_CHECKING:
    from pipeline.artifacts.run_directory import RunDirectory
    from pipeline.config.run_config import RunConfig
    from pipeline.execution.fleet import Fleet
    from pipeline.execution.stop import StopRequests
    from pipeline.planning.nodes import Graph


@dataclass(frozen=True)
class Evaluations:
    """Scores models after the stages. A stop cuts an evaluation short: it is done anew, as it was, when the
    same command is run again."""

    config: RunConfig
    directory: RunDirectory
    note: Callable[[str], None]
    stop: StopRequests

    def run(self, graph: Graph, fleet: Fleet) -> None:
        """Pairs of reward models, then held-out prompts; each result is in run.json once it is there.

        Raises:
            KeyboardInterrupt: a stop was asked for; results that were there are kept.
        """
        self._pairs(graph, fleet)
        if graph.held_out is not None and graph.evaluations_pending:
            for note in graph.held_out.remarks():
                self.note(note)
        for name, key in graph.evaluations.items():
            self._keep(name, self._prompts(graph, fleet, name, key))

    def _prompts(self, graph: Graph, fleet: Fleet, name: str, key: str) -> dict[str, Any]:
        from pipeline.evaluation.held_out import changed_code, evaluate, finished

        assert self.config.eval is not None
        assert graph.held_out is not None
        code, directory = graph.held_out.code, self.directory.path / "eval"
        result = finished(directory, name, key, code)
        if result is not None:
            return result
        self.stop.begin_at_once(f"the evaluation of {name} is done anew next time")
        if changed_code(directory, name, key, code):
            self.note(f"eval {name}: runs again: changed code of {' or '.join(code)}")
        began = time.monotonic()
        phase(f"evaluating {name}")
        result = evaluate(
            name,
            graph.weights[name],
            graph.held_out,
            self.config.eval,
            fleet.engines(),
            graph.tokenizer,
            directory,
            self.config.seed,
        )
        return result | {"seconds": round(time.monotonic() - began, 1)}

    def _pairs(self, graph: Graph, fleet: Fleet) -> None:
        """Let every reward model score its stage's held-out pairs, unless it has done so."""
        from pipeline.evaluation.held_out import finished
        from pipeline.evaluation.pairs import evaluate_pairs
        from pipeline.execution.contexts import Contexts

        directory = self.directory.path / "eval"
        for wanted in graph.pair_evaluations:
            name, pairs = wanted.node.name, wanted.node.prepared.eval_data
            assert pairs is not None
            result = finished(directory, name, wanted.key)
            if result is None:
                self.stop.begin_at_once(f"the evaluation of {name} is done anew next time")
                began = time.monotonic()
                scorer = Contexts(fleet).pair_scorer(wanted.node, graph.weights[name])
                phase(f"evaluating {name} on pairs")
                result = evaluate_pairs(name, scorer, pairs, graph.tokenizer, directory, wanted.key)
                result["seconds"] = round(time.monotonic() - began, 1)
            self._keep(name, result)

    def _keep(self, name: str, result: dict[str, Any]) -> None:
        earlier = self.directory.state["eval"].get(name, {})
        if "seconds" in earlier and earlier.get("fingerprint") == result["fingerprint"]:
            result = {"seconds": earlier["seconds"]} | result  # Of the session in which it was done.
        self.directory.state["eval"][name] = result
        self.directory.save()

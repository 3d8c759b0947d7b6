"""Report and model cards, made from the files of a run directory."""

from __future__ import annotations

from pipeline.report.build import build_report
from pipeline.report.card import CardFacts, adapter_card, write_card
from pipeline.report.compare_page import read_runs, write_page

__all__ = ["CardFacts", "adapter_card", "build_report", "read_runs", "write_card", "write_page"]

"""metrics.json and the files of a run folder -> HTML page, terminal table, model card."""

from distill.evaluation.results import validate_metrics
from distill.report.card import mark_model_card, write_model_card
from distill.report.memorization import sentence as memorization_sentence
from distill.report.page import write_report
from distill.report.summary import faults, terminal_summary
from distill.report.tables import terminal_table

__all__ = [
    "faults", "mark_model_card", "memorization_sentence", "terminal_summary", "terminal_table", "validate_metrics",
    "write_model_card", "write_report",
]  # fmt: skip

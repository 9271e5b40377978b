"""What the numbers of metrics.json say: whether the trade-off shows, and whether each arm does what is hoped for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.report.document import Cell, Table
from distill.report.tables import (
    EOS_AUC,
    FID,
    FINDING_AUC,
    PADDING_AUC,
    REFERENCES,
    WORD_AUC,
    Comparison,
    Metric,
    Tone,
    compare,
    estimate,
    format_estimate,
    ordered_arms,
)

SUBJECTS = {
    WORD_AUC: "localization (word AUC)",
    FID: "image quality (FID)",
    FINDING_AUC: "faithfulness to the caption (finding AUC)",
}


@dataclass(frozen=True)
class Verdict:
    """A question, its answer, and the numbers that it follows from.

    holds: whether what one hopes for is shown; None where the numbers cannot tell, or nothing was hoped for.
    """

    arm: str
    question: str
    answer: str
    tone: Tone
    evidence: str
    holds: bool | None


def _show(name: str, entry: Mapping[str, Any], metric: Metric) -> str:
    return f"{name} {' '.join(format_estimate(estimate(entry, metric), metric.unit)).strip()}"


def _ask(arms: Mapping[str, Mapping[str, Any]], arm: str, other: str, metric: Metric, kind: str) -> Verdict:
    """kind: `gain` (hope: better), `keep` (hope: not worse), `price` (an expected loss, no hope)."""
    result = compare(arms[arm], arms[other], metric)
    subject = SUBJECTS[metric]
    evidence = f"{_show(arm, arms[arm], metric)}, {_show(other, arms[other], metric)}"
    question = {
        "gain": f"Is {subject} of {arm} better than of {other}?",
        "keep": f"Does {arm} keep the {subject} of {other}?",
        "price": f"Does {arm} pay with {subject}, against {other}?",
    }[kind]
    answers: dict[tuple[str, Comparison], tuple[str, Tone, bool | None]] = {
        ("gain", "better"): ("yes", "good", True),
        ("gain", "worse"): ("no, it is worse", "bad", False),
        ("gain", "overlap"): ("not shown: intervals overlap", "even", False),
        ("keep", "better"): ("yes, and gains", "good", True),
        ("keep", "worse"): ("no", "bad", False),
        ("keep", "overlap"): ("no loss seen: intervals overlap", "good", True),
        ("price", "better"): ("no, it gains", "good", None),
        ("price", "worse"): ("yes", "bad", None),
        ("price", "overlap"): ("not shown: intervals overlap", "even", None),
    }
    if result is None:
        return Verdict(arm, question, "cannot be told: not measured", "muted", evidence, None)
    answer, tone, holds = answers[kind, result]
    return Verdict(arm, question, answer, tone, evidence, holds)


def verdicts(metrics: Mapping[str, Any]) -> list[Verdict]:
    """What the comparison is about, answered from the intervals.

    The trade-off: learnable against frozen. Its cure: every other arm localizes better than learnable and draws better
    than frozen, and keeps the localization of frozen and the quality of learnable. Without these two arms: every
    arm against the base.
    """
    arms = ordered_arms(metrics)
    found = []
    if "frozen" in arms and "learnable" in arms:
        found += [_ask(arms, "learnable", "frozen", metric, "gain") for metric in (FID, FINDING_AUC)]
        found.append(_ask(arms, "learnable", "frozen", WORD_AUC, "price"))
    for arm in arms:
        if arm in REFERENCES:
            continue
        if "learnable" in arms:
            found.append(_ask(arms, arm, "learnable", WORD_AUC, "gain"))
        if "frozen" in arms:
            found.append(_ask(arms, arm, "frozen", WORD_AUC, "keep"))
            found.append(_ask(arms, arm, "frozen", FID, "gain"))
        if "learnable" in arms:
            found.append(_ask(arms, arm, "learnable", FID, "keep"))
            found.append(_ask(arms, arm, "learnable", FINDING_AUC, "keep"))
    if not found and "base" in arms:
        found = [
            _ask(arms, arm, "base", metric, "gain")
            for arm in arms
            if arm != "base"
            for metric in (WORD_AUC, FID, FINDING_AUC)
        ]
    return found


def verdict_table(found: list[Verdict]) -> Table:
    """One row a question."""
    rows: list[list[str | Cell]] = [
        [verdict.question, Cell(verdict.answer, tone=verdict.tone), verdict.evidence] for verdict in found
    ]
    return Table(["question", "answer", "numbers"], rows)


@dataclass(frozen=True)
class Outcome:
    """One sentence of the verdict, with what it is about and its answer in a word or two."""

    subject: str
    answer: str
    tone: Tone
    sentence: str


def outcomes(metrics: Mapping[str, Any], found: list[Verdict]) -> list[Outcome]:
    """Whether the trade-off shows, which arms do what is hoped for, and where attention leaks."""
    arms = ordered_arms(metrics)
    said = []
    if "frozen" in arms and "learnable" in arms:
        said.append(_tradeoff(arms["frozen"], arms["learnable"]))
    for arm in dict.fromkeys(verdict.arm for verdict in found if verdict.arm not in REFERENCES):
        said.append(_hopes(arm, [verdict for verdict in found if verdict.arm == arm]))
    said += _leaks(arms)
    if len(arms) == 1:
        said.append(Outcome("comparison", "none", "muted", "There is one model and no other to compare it with."))
    return said


def outcome_table(said: list[Outcome]) -> Table:
    """One row an outcome."""
    rows: list[list[str | Cell]] = [
        [outcome.subject, Cell(outcome.answer, tone=outcome.tone), outcome.sentence] for outcome in said
    ]
    return Table(["", "", ""], rows)


def _tradeoff(frozen: Mapping[str, Any], learnable: Mapping[str, Any]) -> Outcome:
    quality, localization = compare(learnable, frozen, FID), compare(learnable, frozen, WORD_AUC)
    if quality is None or localization is None:
        return Outcome("trade-off", "cannot be told", "muted", "FID or word AUC was not measured.")
    words = {"better": "better", "worse": "worse", "overlap": "not clearly different"}
    shows = quality == "better" and localization == "worse"
    numbers = "; ".join(
        f"{metric.name} {words[result]}: {_show('learnable', learnable, metric)}, {_show('frozen', frozen, metric)}"
        for metric, result in ((FID, quality), (WORD_AUC, localization))
    )
    return Outcome(
        "trade-off",
        "shows" if shows else "does not show",
        "good" if shows else "even",
        f"With a trained text encoder, compared with a frozen one, {numbers}.",
    )


def _hopes(arm: str, asked: list[Verdict]) -> Outcome:
    missed = [verdict for verdict in asked if verdict.holds is False]
    known = [verdict for verdict in asked if verdict.holds is not None]
    if not known:
        return Outcome(arm, "cannot be told", "muted", "Nothing that this arm is asked was measured.")
    untold = f" {len(asked) - len(known)} more could not be told." if len(known) < len(asked) else ""
    if missed:
        details = " ".join(
            f"{verdict.question} {verdict.answer[:1].upper()}{verdict.answer[1:]} ({verdict.evidence})."
            for verdict in missed
        )
        answer = f"{len(known) - len(missed)} of {len(known)} hopes hold"
        tone: Tone = "even" if len(missed) < len(known) else "bad"
        return Outcome(arm, answer, tone, f"It does not show all that one hopes for. {details}{untold}")
    overlaps = sum("overlap" in verdict.answer for verdict in known)
    careful = f" In {overlaps} of them the intervals overlap: no loss is seen, none is ruled out." if overlaps else ""
    return Outcome(
        arm, f"{len(known)} of {len(known)} hopes hold", "good", f"It shows all that one hopes for.{careful}{untold}"
    )


def _leaks(arms: Mapping[str, Mapping[str, Any]]) -> list[Outcome]:
    said = []
    for name, entry in arms.items():
        word = estimate(entry, WORD_AUC)
        for metric, place in ((EOS_AUC, "EOS token"), (PADDING_AUC, "padding")):
            tail = estimate(entry, metric)
            if word.high is not None and tail.low is not None and tail.low > word.high:
                sentence = (
                    f"The {place} localizes better than the finding's own words: "
                    f"{_show(metric.name, entry, metric)}, {_show(WORD_AUC.name, entry, WORD_AUC)}."
                )
                said.append(Outcome(name, "leaks", "bad", sentence))
    return said

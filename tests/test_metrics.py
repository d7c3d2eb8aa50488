"""The numbers against published ones, numbers worked out by hand, and other ways to compute them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from headstart.metrics import (
    CONFIDENCES,
    Labels,
    Shares,
    accuracy_interval,
    baselines,
    calibrate,
    calibration_error,
    comparison,
    coverage,
    evaluate,
    f1_intervals,
    precision_recall,
    reliability,
    report_text,
    scores,
    slices,
    temperature,
    thresholds_of,
)

NAMES = ("bad", "good", "so-so")
TRUTH = np.array([0, 0, 0, 0, 1, 1])
SAID = np.array(
    [
        [0.80, 0.10, 0.10],
        [0.60, 0.20, 0.20],
        [0.30, 0.50, 0.20],
        [0.10, 0.20, 0.70],
        [0.05, 0.90, 0.05],
        [0.45, 0.40, 0.15],
    ]
)
"""Predicted 0 0 1 2 1 0: three of six right, and nothing is truly so-so."""


def share_of(labels: list[int], names: int = 2) -> NDArray[np.float64]:
    """Probabilities that say these labels, surely."""
    return np.eye(names)[labels]


# --- one part of the data


def test_every_number_as_worked_out_by_hand() -> None:
    got = evaluate(SAID, TRUTH, NAMES)
    assert got["n"] == 6
    assert got["accuracy"] == 3 / 6
    assert got["labels"] == ["bad", "good", "so-so"]
    assert got["per_label"] == {
        "bad": {"precision": pytest.approx(2 / 3), "recall": 2 / 4, "f1": pytest.approx(4 / 7), "support": 4},
        "good": {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2},
        "so-so": {"precision": 0, "recall": 0, "f1": 0, "support": 0},
    }
    assert got["macro_f1"] == pytest.approx((4 / 7 + 1 / 2) / 2), "over the labels that are there"
    assert got["confusion_matrix"] == [[2, 1, 1], [1, 1, 0], [0, 0, 0]], "a row for each true label"
    shares = (0.80, 0.60, 0.30, 0.10, 0.90, 0.40)
    assert got["log_loss"] == pytest.approx(-sum(math.log(share) for share in shares) / 6)
    assert got["accuracy_ci95"] == list(accuracy_interval(3, 6))
    assert got["ece"] == error_of(SAID, TRUTH)


def test_all_numbers_are_plain_and_can_be_written() -> None:
    got = evaluate(SAID, TRUTH, NAMES)
    kinds = {type(value) for value in (*got.values(), *got["per_label"]["bad"].values(), *got["confusion_matrix"][0])}
    assert kinds == {int, float, list, dict}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(1, 1000), min_size=4, max_size=4)), min_size=1, max_size=40
    )
)
def test_any_answers_counted_one_by_one(rows: list[tuple[int, list[int]]]) -> None:
    truth = np.array([label for label, _ in rows])
    said = np.array([counts for _, counts in rows], dtype=np.float64)
    said /= said.sum(axis=1, keepdims=True)
    got = evaluate(said, truth, ("a", "b", "c", "d"))
    table = [[0] * 4 for _ in range(4)]
    for label, row in zip(truth.tolist(), said.tolist(), strict=True):
        table[label][row.index(max(row))] += 1
    assert got["confusion_matrix"] == table
    assert got["accuracy"] == pytest.approx(sum(table[i][i] for i in range(4)) / len(rows))
    for i, name in enumerate("abcd"):
        true, told = sum(table[i]), sum(table[j][i] for j in range(4))
        one = got["per_label"][name]
        assert one["support"] == true
        assert one["recall"] == pytest.approx(table[i][i] / true if true else 0)
        assert one["precision"] == pytest.approx(table[i][i] / told if told else 0)
        assert one["f1"] == pytest.approx(2 * table[i][i] / (true + told) if true + told else 0)
    present = sorted(set(truth.tolist()))
    assert got["macro_f1"] == pytest.approx(sum(got["per_label"]["abcd"[i]]["f1"] for i in present) / len(present))
    assert got["log_loss"] == pytest.approx(
        -sum(math.log(row[label]) for label, row in zip(truth.tolist(), said.tolist(), strict=True)) / len(rows)
    )


def test_sure_and_wrong_is_a_large_number_and_not_infinite() -> None:
    got = evaluate(share_of([0, 1]), np.array([0, 0]), ("a", "b"))
    assert 10 < got["log_loss"] < 100, "JSON has no infinity"
    assert got["ece"] == 0.5
    assert evaluate(share_of([0, 1]), np.array([0, 1]), ("a", "b"))["log_loss"] == pytest.approx(0, abs=1e-9)


def test_one_text_is_enough() -> None:
    got = evaluate(np.array([[0.3, 0.7]]), np.array([1]), ("a", "b"))
    assert (got["n"], got["accuracy"], got["macro_f1"]) == (1, 1, 1)
    assert got["log_loss"] == pytest.approx(-math.log(0.7))


# --- the interval


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_as_published(correct: int, n: int, low: float, high: float) -> None:
    assert accuracy_interval(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert accuracy_interval(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(n=st.integers(1, 100_000), share=st.floats(0, 1))
def test_the_interval_is_wilsons(n: int, share: float) -> None:
    """Its ends are the shares whose own standard error puts them 1.96 of it away from what was seen."""
    correct = round(n * share)
    low, high = accuracy_interval(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    for end in (low, high):
        away = (correct / n - end) ** 2
        assert away == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-4, abs=1e-12)


# --- several labels a text, and ordered ones


def test_several_labels_by_hand() -> None:
    said = np.array([[0.9, 0.2, 0.6], [0.4, 0.7, 0.1], [0.8, 0.6, 0.3], [0.1, 0.1, 0.1]])
    truth = np.array([[1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    got = evaluate(said, truth, NAMES, "multi", (0.5, 0.5, 0.5))
    assert got["accuracy"] == 2 / 4, "the first and the last text have all their labels right"
    assert got["per_label"]["bad"] == {"precision": 1, "recall": 2 / 3, "f1": pytest.approx(0.8), "support": 3}
    assert got["per_label"]["good"] == {"precision": 1 / 2, "recall": 1, "f1": pytest.approx(2 / 3), "support": 1}
    assert got["macro_f1"] == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    assert got["micro_f1"] == pytest.approx(2 * 4 / (5 + 5)), "4 of 5 given are right, of 5 that are there"
    assert got["confusion_matrix"] == [[[1, 0], [1, 2]], [[2, 1], [0, 1]], [[3, 0], [0, 1]]]
    losses = np.where(truth == 1, np.log(said), np.log(1 - said))
    assert got["log_loss"] == pytest.approx(-losses.mean())
    confidence = np.array([0.9 * 0.8 * 0.6, 0.6 * 0.7 * 0.9, 0.8 * 0.6 * 0.7, 0.9**3])
    assert got["ece"] == pytest.approx(calibration_error(confidence, np.array([True, False, False, True])))
    assert evaluate(said, truth, NAMES, "multi", (0.3, 0.65, 0.5))["accuracy"] == 1
    text = report_text(got)
    assert "micro avg" in text
    assert "samples avg" not in text
    for name, line in zip(NAMES, text.split("\n")[2:], strict=False):
        assert line.split() == [
            name,
            *(f"{got['per_label'][name][key]:.3f}" for key in ("precision", "recall", "f1")),
            str(got["per_label"][name]["support"]),
        ]


def test_ordered_labels_tell_how_far_off_answers_are() -> None:
    truth, answers = np.array([0, 1, 2, 3, 4, 4]), np.array([0, 1, 2, 4, 2, 4])
    said = np.eye(5)[answers] * 0.9 + 0.02
    got = evaluate(said, truth, ("1", "2", "3", "4", "5"), "ordered")
    assert got["mean_absolute_error"] == pytest.approx(3 / 6)
    by_chance = ((truth[:, None] - answers) ** 2).mean()
    assert got["quadratic_kappa"] == pytest.approx(1 - (5 / 6) / by_chance)
    assert "quadratic_kappa" not in evaluate(said, truth, ("1", "2", "3", "4", "5"))
    alone = evaluate(np.eye(5)[[1, 1]] * 0.9 + 0.02, np.array([1, 1]), ("1", "2", "3", "4", "5"), "ordered")
    assert alone["quadratic_kappa"] == 0


def test_each_label_is_scaled_and_shifted_by_itself() -> None:
    random = np.random.default_rng(0)
    real = random.normal(size=(4000, 2)) * 2
    truth = (random.random((4000, 2)) < 1 / (1 + np.exp(-real))).astype(np.int64)
    fitted = calibrate(real * [3.0, 0.5] + [1.0, -1.0], truth)
    np.testing.assert_allclose(fitted.scale, [1 / 3, 2], rtol=0.12)
    np.testing.assert_allclose(fitted.shift, [-1 / 3, 2], atol=0.2)
    assert set(fitted.described()) == {"scale", "shift"}
    few = calibrate(real[:1], truth[:1])
    assert np.abs(few.shift).max() < 0.3, "one text says little"


def test_a_threshold_has_the_best_f1_on_validation() -> None:
    random = np.random.default_rng(0)
    said = random.random((300, 3)) * [1.0, 0.4, 1.0]
    truth = (random.random((300, 3)) < said).astype(np.int64)
    truth[:, 2] = 0
    truth[:3, 2] = 1
    got = thresholds_of(said, truth)
    assert got[2] == 0.5, "too few texts have it"
    for label in (0, 1):

        def f1(least: float, label: int = label) -> float:
            given = said[:, label] >= least
            return 2 * (given & (truth[:, label] == 1)).sum() / max(given.sum() + truth[:, label].sum(), 1)

        assert f1(got[label]) == max(f1(least) for least in said[:, label])
    assert got[1] < 0.4


# --- calibration


def sure_and_right(said: Shares, truth: Labels) -> tuple[Shares, NDArray[np.bool_]]:
    return said.max(axis=1), said.argmax(axis=1) == truth


def error_of(said: Shares, truth: Labels) -> float:
    return calibration_error(*sure_and_right(said, truth))


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.97, 0.95, 0.94, 0.72, 0.69, 0.52])
    correct = np.array([True, True, False, True, False, True])
    said = np.column_stack([confidence, 1 - confidence])
    # Fifteenths: the last holds 0.97, 0.95 and 0.94; the 11th 0.72 and 0.69; the 8th 0.52.
    expected = (abs(2 - 2.86) + abs(1 - 1.41) + abs(1 - 0.52)) / 6
    assert error_of(said, np.where(correct, 0, 1)) == pytest.approx(expected)


def test_confidence_of_one_is_in_the_last_bin() -> None:
    said = np.array([[1.0, 0.0], [0.95, 0.05]])
    # Together they are one right answer for 1.95 expected; apart the gaps would be 1 and 0.05.
    assert error_of(said, np.array([1, 0])) == pytest.approx((1.95 - 1) / 2)
    assert error_of(share_of([0, 1, 1]), np.array([0, 1, 1])) == 0


CONFIDENCE = st.just(1.0) | st.builds(lambda k, part: (k + part) / 15, st.integers(5, 14), st.floats(0.01, 0.99))
"""Of the likeliest of three labels; never on the edge of two fifteenths, where rounding would decide."""


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), CONFIDENCE), min_size=1, max_size=60))
def test_calibration_error_as_gaps_added_up(rows: list[tuple[int, int, float]]) -> None:
    """Guo's weighted mean of gaps is the sum over bins of |right answers - confidence|, over n."""
    truth, best = (np.array([row[i] for row in rows], dtype=np.int64) for i in (0, 1))
    confidence = np.array([row[2] for row in rows])
    said = np.repeat((1 - confidence[:, None]) / 2, 3, axis=1)
    said[np.arange(len(rows)), best] = confidence
    gaps, _ = np.histogram(confidence, bins=15, range=(0, 1), weights=(best == truth) - confidence)
    got = error_of(said, truth)
    assert got == pytest.approx(np.abs(gaps).sum() / len(rows), abs=1e-12)
    assert 0 <= got <= 1
    order = np.random.default_rng(0).permutation(len(rows))
    assert error_of(said[order], truth[order]) == pytest.approx(got, abs=1e-12)


# --- the report


def test_the_report_holds_every_label_also_one_that_never_occurs() -> None:
    text = report_text(evaluate(SAID, TRUTH, NAMES))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["bad"] == ["0.667", "0.500", "0.571", "4"]
    assert rows["good"] == ["0.500", "0.500", "0.500", "2"]
    assert rows["so-so"] == ["0.000", "0.000", "0.000", "0"]
    assert rows["accuracy"] == ["0.500", "6"]


def test_a_label_has_one_line_whatever_is_in_its_name() -> None:
    lines = report_text(evaluate(SAID, TRUTH, ("bad", "x\n```\n# good", "so\x1b[2Jso"))).splitlines()
    assert len(lines) == len(report_text(evaluate(SAID, TRUTH, NAMES)).splitlines())
    assert not any("\x1b" in line for line in lines)


# --- the baselines

NOUNS = ("film", "hotel", "soup", "phone", "app", "waiter", "room", "story")


def scored(
    train: list[str], labels: NDArray[np.int64], test: list[str], *, truth: NDArray[np.int64]
) -> dict[str, dict[str, float]]:
    return {name: scores(said, truth) for name, said in baselines(train, labels, test).items()}


def test_the_commonest_label_of_training_is_the_floor() -> None:
    texts = [f"text {i}" for i in range(10)]
    got = scored(texts, np.array([1] * 6 + [0] * 4), texts[:8], truth=np.array([0] * 5 + [1] * 3))
    # It says 1 to everything: 3 of 8 right, F1 of 1 is 2·3/(3 + 8), of 0 nothing.
    assert got["majority"] == {"accuracy": 3 / 8, "macro_f1": pytest.approx((6 / 11) / 2)}
    assert set(got) == {"majority", "tfidf_logreg"}


def test_macro_f1_of_a_baseline_is_over_the_labels_present() -> None:
    texts = ["a good film", "a bad film", "a plain film"] * 4
    got = scored(texts, np.array([1, 0, 2] * 4), texts[:2], truth=np.array([1, 1]))
    # It says 1 and 0 where both are 1: the F1 of 1 is 2·1/(1 + 2), and 0 is only said, not there.
    assert got["tfidf_logreg"] == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 3)}
    assert got["majority"] == {"accuracy": 0, "macro_f1": 0}, "the first of equally common labels"


def test_one_telling_word_is_learnt() -> None:
    train = [f"the {noun} was {word}" for noun in NOUNS[:5] for word in ("superb", "awful")]
    test = [f"a {word} {noun}" for noun in NOUNS[5:] for word in ("superb", "awful")]
    got = scored(train, np.array([1, 0] * 5), test, truth=np.array([1, 0] * 3))
    assert got["tfidf_logreg"] == {"accuracy": 1, "macro_f1": 1}
    assert got["majority"]["accuracy"] == 0.5


def test_pairs_of_words_are_read() -> None:
    # Each word is as often in one label as in the other; only the pairs tell.
    pairs = [("very", "cheap", 1), ("very", "slow", 0), ("hardly", "cheap", 0), ("hardly", "slow", 1)]
    train = [f"{noun} {first} {second}" for noun in NOUNS for first, second, _ in pairs]
    labels = np.array([label for _ in NOUNS for _, _, label in pairs])
    test = [f"{first} {second}" for first, second, _ in pairs]
    got = scored(train, labels, test, truth=np.array([label for _, _, label in pairs]))
    assert got["tfidf_logreg"]["accuracy"] == 1


def test_a_word_may_be_one_character() -> None:
    train = [f"{first} {second}" for first in "甲乙丙丁" for second in "好壞"]
    got = scored(train, np.array([1, 0] * 4), ["戊 好", "戊 壞"], truth=np.array([1, 0]))
    assert got["tfidf_logreg"]["accuracy"] == 1


def test_texts_without_a_word_leave_the_commonest_label() -> None:
    train, labels = ["!!!", "???", "...", "😒"], np.array([1, 1, 1, 0])
    got = scored(train, labels, ["?!", "a word"], truth=np.array([1, 0]))
    assert got["tfidf_logreg"] == got["majority"] == {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3)}


def test_a_test_text_of_unknown_words_gets_an_answer() -> None:
    got = scored(["good film", "bad film"] * 3, np.array([1, 0] * 3), ["zebra", "!!!"], truth=np.array([1, 1]))
    assert got["tfidf_logreg"]["accuracy"] in (0, 1), "both get the same"


# --- how far its confidence can be trusted


def drawn(seed: int, n: int, labels: int, sharpness: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Logits, and truths drawn from their softmax, before the logits are made `sharpness` times as large."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, labels)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = np.array([random.choice(labels, p=share) for share in shares])
    return logits * sharpness, truth


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("labels", [2, 5])
def test_the_temperature_undoes_what_made_logits_too_sharp_or_too_flat(sharpness: float, labels: int) -> None:
    logits, truth = drawn(0, 6000, labels, sharpness)
    assert temperature(logits, truth) == pytest.approx(sharpness, rel=0.08)


def test_a_few_texts_do_not_move_the_temperature_far() -> None:
    logits, truth = np.array([[9.0, 0.0]] * 5), np.zeros(5, np.int64)  # all right: without a prior, towards 0
    assert 0.8 < temperature(logits, truth) < 1.0
    assert temperature(logits, 1 - truth) > 1.5, "all wrong, and surely so"


def test_bins_of_confidence_as_worked_out_by_hand() -> None:
    said = np.array([[0.99, 0.01], [0.01, 0.99], [0.55, 0.45], [0.45, 0.55]])
    assert reliability(*sure_and_right(said, np.array([0, 0, 0, 0]))) == [
        {"confidence": pytest.approx(0.55), "accuracy": 0.5, "n": 2},
        {"confidence": pytest.approx(0.99), "accuracy": 0.5, "n": 2},
    ]
    assert error_of(said, np.array([0, 0, 0, 0])) == pytest.approx((0.05 + 0.49) / 2)


def test_who_answers_only_when_sure_is_right_more_often() -> None:
    rows = coverage(np.array([0.55, 0.65, 0.92, 0.97]), np.array([False, True, False, True]))
    found = {row["min_confidence"]: (row["coverage"], row["accuracy"]) for row in rows}
    assert tuple(found) == CONFIDENCES
    assert found[0.5] == (1.0, 0.5)
    assert found[0.6] == (0.75, pytest.approx(2 / 3))
    assert found[0.95] == (0.25, 1.0)
    assert found[0.99] == (0.0, None)


# --- is it luck?


def test_mcnemar_as_in_the_book() -> None:
    # Of 100 texts 15 are right only by ours and 5 only by the other: 2·P(at most 5 of 20 heads) is 0.0414.
    truth = np.zeros(100, np.int64)
    mine = np.array([0] * 15 + [1] * 5 + [0] * 70 + [1] * 10)
    other = np.array([1] * 15 + [0] * 5 + [0] * 70 + [1] * 10)
    got = comparison(mine, other, truth)
    assert got["difference"] == pytest.approx(0.10)
    assert got["p_value"] == pytest.approx(0.0414, abs=1e-4)
    low, high = got["difference_ci95"]  # by the normal formula 0.10 ± 1.96·0.0436
    assert (low, high) == (pytest.approx(0.0145, abs=0.01), pytest.approx(0.1855, abs=0.01))
    assert comparison(mine, mine, truth) == {"difference": 0.0, "difference_ci95": [0.0, 0.0], "p_value": 1.0}


def test_f1_intervals_hold_the_f1_and_are_as_wide_as_by_drawing_rows() -> None:
    random = np.random.default_rng(3)
    truth = random.integers(3, size=300)
    said = np.where(random.random(300) < 0.7, truth, random.integers(3, size=300))
    whole = evaluate(np.eye(4)[said] * 0.96 + 0.01, truth, ("a", "b", "c", "never"))
    got = f1_intervals(said, truth, 4)
    drawn = []
    for _ in range(1000):
        some = random.integers(300, size=300)
        drawn.append(scores(said[some], truth[some])["macro_f1"])
    assert got["macro_f1"] == pytest.approx(np.quantile(drawn, (0.025, 0.975)).tolist(), abs=0.012)
    for name, (low, high) in zip("abc", got["f1"], strict=False):
        assert low < whole["per_label"][name]["f1"] < high
    assert got["f1"][3] == [0.0, 0.0], "a label that is not there"


# --- curves and slices


def test_precision_and_recall_of_each_label_that_is_there() -> None:
    said = np.array([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.7, 0.3, 0], [0.2, 0.8, 0]])
    curves = precision_recall(said, np.array([0, 0, 1, 1]))
    assert [curve["label"] for curve in curves] == [0, 1]
    # Label 0 by falling share: right, wrong, right, wrong: (1/1 + 2/3) / 2.
    assert curves[0]["average"] == pytest.approx((1 + 2 / 3) / 2)
    assert curves[0]["points"][0] == [1.0, 0.5]
    assert curves[0]["points"][-1] == [0.0, 1.0]
    many = precision_recall(np.column_stack([np.linspace(0, 1, 500), np.linspace(1, 0, 500)]), np.arange(500) % 2)
    assert all(len(curve["points"]) <= 60 for curve in many), "few enough to draw"


def test_slices_are_counted_by_hand_and_the_worst_comes_first() -> None:
    texts = ["a film"] * 30 + ["it isn't a film that anybody would want to see twice in a year"] * 30
    right = np.array([True] * 30 + [False] * 15 + [True] * 15)
    truth = np.array([0, 1] * 30)
    rows = {row["slice"]: row for row in slices(texts, truth, right, ("no", "yes"), ["A film that is seen"])}
    negation = "a negation (not, never, n't, …)"
    assert rows[negation]["n"] == rows["at least 14 words"]["n"] == rows["a word that training never shows"]["n"] == 30
    assert rows[negation]["accuracy"] == 0.5
    assert rows[negation]["accuracy_ci95"] == accuracy_interval(15, 30)
    assert rows["at most 2 words"]["accuracy"] == 1.0
    assert rows["label yes"]["n"] == 30
    assert [row["accuracy"] for row in rows.values()] == sorted(row["accuracy"] for row in rows.values())


@pytest.mark.parametrize("text", ["not so", "I don't", "I don\u2019t", "do n't", "NEVER again", "no", "without end"])
def test_negations_are_seen(text: str) -> None:
    rows = slices([text] * 20, np.zeros(20, np.int64), np.ones(20, bool), ("a", "b"), [text])
    assert any(row["slice"].startswith("a negation") for row in rows)


@pytest.mark.parametrize("text", ["a noble knot", "note this", "norway"])
def test_words_that_only_look_like_negations_are_none(text: str) -> None:
    rows = slices([text] * 20, np.zeros(20, np.int64), np.ones(20, bool), ("a", "b"), [text])
    assert not any(row["slice"].startswith("a negation") for row in rows)


def test_too_few_texts_make_no_slice() -> None:
    assert slices(["a"] * 19, np.zeros(19, np.int64), np.ones(19, bool), ("a", "b"), []) == []

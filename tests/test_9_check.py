"""The exercises' checks: model answers pass, and each wrong answer is called by its own name."""
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import answers  # noqa: E402
import check  # noqa: E402

EXERCISES = [name for name, f in vars(answers).items() if callable(f) and f.__module__ == "answers"]


def said(name, answer, capsys):
    capsys.readouterr()
    assert getattr(check, name)(answer) is None
    return capsys.readouterr().out


@pytest.fixture
def mistakes(monkeypatch):
    """{hint: wrong answer} of the check that is called last, and how it wraps an answer."""
    seen, compare = {}, check.compare
    monkeypatch.setattr(check, "compare", lambda name, yours, truth, cases, wrong: seen.update(
        wrong=wrong, yours=yours) or compare(name, yours, truth, cases, wrong))
    return seen


def test_every_exercise_has_a_check_and_an_answer():
    checks = {name for name, f in vars(check).items() if getattr(f, "__module__", "") == "check" and (f.__doc__ or "").startswith("yours(")}
    assert checks == set(EXERCISES) and len(checks) >= 10


@pytest.mark.parametrize("name", EXERCISES)
def test_right_and_wrong_answers_are_told_apart(name, mistakes, capsys, monkeypatch):
    """The model answer is right; each wrong one gets its hint and no other's, in at most ten lines; so does an answer
    that is wrong in a new way, one that raises, and one that returns nothing."""
    torch.manual_seed(0)
    assert "right, on" in said(name, getattr(answers, name), capsys)
    wrong, compare = mistakes["wrong"], check.compare
    for hint, answer in list(wrong.items()):
        monkeypatch.setattr(check, "compare", lambda name, yours, *more: compare(name, answer, *more))    # as ste wraps its own
        text = said(name, None, capsys)
        assert hint in text and "not yet" in text and text.count("\n") <= 10, (hint, text)
    monkeypatch.setattr(check, "compare", lambda name, yours, truth, *more: compare(name, lambda *a: tuple(
        1.37 * v + 0.5 for v in check.values(truth(*a))), truth, *more))
    text = said(name, None, capsys)
    assert "none of the usual mistakes" in text and "yours" in text and "target" in text and text.count("\n") <= 10
    monkeypatch.setattr(check, "compare", compare)
    assert "it raised" in said(name, lambda *args: 1 / 0, capsys)
    if name != "ste":
        assert "does it end with return" in said(name, lambda *args: None, capsys)
        assert "it should return" in said(name, lambda *args: torch.zeros(2, 2, 2, 2, 2), capsys)


def test_what_notebooks_print_is_compared():
    """Words exactly, numbers nearly; the cells with the tag timing not at all."""
    pytest.importorskip("nbconvert")
    import nbformat
    import notebooks
    same = "error 0.1234, at 1,024 of 24,576 bytes", "error 0.1251, at 1,020 of 24,576  bytes"
    other = "error 0.1234, at 1,024 of 24,576 bytes", "error 0.1534, at 1,024 of 24,576 bytes"
    words = "block 32: yes", "block 32: no"
    assert [notebooks.differ(*pair) for pair in (same, other, words, ("1 and 2", "1"))] == [False, True, True, True]
    cells = [nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("stream", text="7 ms")], metadata={"tags": tags})
             for tags in (["timing"], [])]
    assert list(notebooks.printed(nbformat.v4.new_notebook(cells=cells)).values()) == ["7 ms"]

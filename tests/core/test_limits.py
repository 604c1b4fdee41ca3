"""Everything has a limit, and every limit a reason beside it: docs/limits.md is made from the code."""

import pytest

from docs.limits import ROOT, Source, collect, page


def test_every_limit_queue_and_wait_says_why():
    assert collect().unexplained == [], "a comment beside it: its reason, `bounded: …` or `ends: …`"


def test_the_page_is_the_codes():
    assert (ROOT / "docs" / "limits.md").read_text() == page(), "python docs/limits.py"


@pytest.mark.parametrize(
    "text",
    [
        "ROUNDS_MAX = 3\n",
        "ROUNDS_MAX = 3  # noqa: X100\n",
        "# of something else\n\nROUNDS_MAX = 3\n",
        "A = 1  # a reason of A\nROUNDS_MAX = 3\n",
        "q = deque()\n",
        "q = queue.SimpleQueue()  # news\n",
        "thread.join()\n",
        "event.wait()  # for it\n",
        "condition.wait_for(lambda: done)\n",
    ],
)
def test_what_is_not_explained_is_found(text):
    source = Source("m.py", text)
    found = [*source.limits(), *(call for call, _ in source.calls())]
    assert [row.words for row in found] == [""], text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ROUNDS_MAX = 3  # enough\n", "enough"),
        ("# Enough\n# for all.\nROUNDS_MAX: Final = 3\n", "Enough for all."),
        ("WAIT_S = (\n    3.0  # enough\n)\n", "enough"),
        ("q = deque()  # bounded: by N\n", "by N"),
        ("# bounded: by N\nq = deque()\n", "by N"),
        ("thread.join()  # ends: now\n", "now"),
    ],
)
def test_what_is_explained_is_taken_with_its_words(text, words):
    source = Source("m.py", text)
    found = [*source.limits(), *(call for call, _ in source.calls())]
    assert [row.words for row in found] == [words]


@pytest.mark.parametrize(
    "text", ["event.wait(1)\n", "','.join(x)\n", "d.get(k)\n", "deque(maxlen=N)\n", "U32_MAX = 9\n"]
)
def test_what_has_a_deadline_or_a_size_is_none_of_them(text):
    source = Source("m.py", text)
    assert not [*source.limits(), *source.calls()]

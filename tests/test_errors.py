"""The tree drawn in the docstring is the tree of the classes."""

from __future__ import annotations

import builtins
import re

import pytest
from pydantic import BaseModel, Field, ValidationError, model_validator

from safeside import errors
from safeside.errors import InputError, SafesideError, UnknownNameError, problems_of

LINE = re.compile(r"^(?P<branch>[│ ]*[├└]── )?(?P<name>\w+Error)\b(?: +\((?P<kin>\w+)\))?(?: +(?P<words>.+))?$")
CLASSES = {
    name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, SafesideError)
}


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """For each error of the docstring its parent, by indentation, and its kin in the standard library."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = LINE.match(line)
        if found is None:
            continue
        depth = len(found["branch"] or "") // 4
        parents = [*parents[:depth], found["name"]]
        tree[found["name"]] = (parents[-2] if depth else None, found["kin"])
    return tree


def test_the_drawing_is_the_tree() -> None:
    tree = drawn()
    assert set(tree) == set(CLASSES)
    for name, (parent, kin) in tree.items():
        expected = [*([CLASSES[parent]] if parent else []), *([vars(builtins)[kin]] if kin else [])]
        assert list(CLASSES[name].__bases__) == (expected or [Exception])


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_says_what_it_was_given(name: str) -> None:
    error = CLASSES[name]("What was wrong; what was expected. What to do.")
    assert str(error) == "What was wrong; what was expected. What to do."
    assert CLASSES[name].__doc__


def test_a_key_error_shows_no_quotes() -> None:
    assert str(KeyError("it's")) == '"it\'s"'
    assert str(UnknownNameError("it's")) == "it's"


class Rule(BaseModel):
    """A record with a field that is bounded and a check of the whole."""

    share: float = Field(default=0.0, le=1.0)
    names: tuple[str, ...] = Field(default=(), min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if self.share == 0.5:
            raise InputError("A half is no share. Take another.")
        return self


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"share": 3}, "share: Input should be less than or equal to 1"),
        (
            {"share": 3, "names": ["a", 1]},
            "share: Input should be less than or equal to 1; names.1: Input should be a valid string",
        ),
        ({"share": 0.5}, "A half is no share. Take another."),
        ({"share": 0.1, "names": "a"}, "names: Input should be a valid list"),  # what a file calls a tuple
        ({"names": []}, "names: List should have at least 1 item after validation, not 0"),
    ],
)
def test_problems_stand_on_one_line_without_the_values(values: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Rule.model_validate(values)
    assert problems_of(caught.value) == told

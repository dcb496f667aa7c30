"""What a stranger's package looks like: one function that registers what it brings, named in pyproject.toml."""

from safeside import Family, register_adapter, register_family
from safeside.evals.judges import JUDGES, by_refusal
from safeside.tasks.sources import Part, Source
from safeside.tasks.task import Task, register_task

SHOUTING = Task(
    name="example/shouting",
    labels=("shouting",),
    sources=(Source("forum", Part("forum/train.jsonl"), test=Part("forum/test.jsonl")),),
)


def register() -> None:
    """Called once by safeside, when it first meets a name that it does not know."""
    register_adapter("example/middle", "safeside_example.middle:Middle")
    register_family(Family("example/olmo", ("olmo",)))
    register_task("example/shouting", SHOUTING)
    JUDGES.register("example/shouts", by_refusal(shouts))


def shouts(answer: str) -> bool:
    """Whether an answer is all in capitals."""
    return answer.isupper()

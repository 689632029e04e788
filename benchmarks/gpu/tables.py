"""Stages that measure our loops beside the reference's."""

from collections.abc import Callable

from pdlm_hf.bench.decode import compare

from .run import Run


def table(regions: int, batches: tuple[int, ...]) -> Callable[[Run], None]:
    """A stage: the table of `pdlm bench decode` for so many regions, kept after every turn."""

    def work(run: Run) -> None:
        def keep(found: dict) -> None:
            rows = dict(found["rows"])
            run.put("all", {name: value for name, value in found.items() if name != "rows"})
            for name, row in rows.items():
                run.put(name, row)

        compare(run.bench, regions, list(batches), run.slots, run.slots, run.repeats, keep)

    return work

"""Training on streams: resumed again and again, with workers, on more ranks, or refused."""

import json

import pytest
import torch
from support.distributed import launch
from support.trainings import DOMAINS, learned, tiny_run

from koff.data.sources import DataSource

STEPS = 9


def sources(folder, **changes):
    """The domains of ``tiny_run``, as streams."""
    found = {}
    for name in ("en", "es"):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            lines = (json.dumps(document) + "\n" for document in DOMAINS[name])
            path.write_text("".join(lines))
        found[name] = DataSource(path=path, **{"streaming": True, **changes})
    return found


def run(folder, domains, **changes):
    return tiny_run(folder, domains=domains, **{"max_steps": STEPS, "save_steps": 3, **changes})


def test_resumed_twice_in_a_row_a_run_is_the_same(tmp_path):
    domains = sources(tmp_path)
    whole = run(tmp_path / "a", domains)
    whole.train()
    folder = tmp_path / "a"
    for step, workers in ((3, 0), (6, 2)):
        again = run(tmp_path / str(step), domains, dataloader_num_workers=workers)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        for name, tensor in learned(whole.model).items():
            assert torch.equal(tensor, learned(again.model)[name]), (step, name)
        folder = tmp_path / str(step)
        rows = [
            json.loads((place / "checkpoint-9" / "koff_streams.json").read_text())
            for place in (tmp_path / "a", folder)
        ]
        assert rows[0] == rows[1] and rows[0]["streams"]["en"]["bookmark"][0] == STEPS - 1


def test_a_stream_and_packed_blocks_train_on_the_same_rows_in_another_order(tmp_path):
    streamed = run(tmp_path / "a", sources(tmp_path), save_strategy="no")
    packed = run(tmp_path / "b", sources(tmp_path, streaming=False), save_strategy="no")
    first, second = (r.mixture.sources[0].blocks for r in (streamed, packed))
    assert torch.equal(first.row(5)[0], second.blocks[5])
    assert [row for batch in streamed._sampler() for _, row, _ in batch][:4] == [0, 0, 1, 1]


def test_what_cannot_be_exact_is_refused(tmp_path):
    domains = sources(tmp_path)
    run(tmp_path / "a", domains, max_steps=3).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-3")

    def resume(message, domains=domains, **changes):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "b", domains, **changes).train(resume_from_checkpoint=checkpoint)

    resume("must have as many rows as before, 2, got 4", gradient_accumulation_steps=2)
    resume(r"must be \['en', 'es'\], as .*, got \[\]", sources(tmp_path, streaming=False))
    resume("the place in 'en' must be one in the same data", sources(tmp_path, skip=1))
    path = domains["es"].path
    path.write_text(path.read_text() + path.read_text())
    resume("the place in 'es' must be one in the same data, got other files or settings")


def test_what_needs_a_number_of_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps must be given where a domain is streamed"):
        run(tmp_path / "a", sources(tmp_path), max_steps=-1)
    with pytest.raises(ValueError, match="general_weights must be given where a part is streamed"):
        run(
            tmp_path / "a",
            sources(tmp_path, streaming=False),
            general={"en": sources(tmp_path)["en"]},
            general_every=2,
        )


@pytest.mark.slow
def test_two_ranks_go_on_with_the_rows_of_one(tmp_path):
    sources(tmp_path)
    for ranks in (1, 2):
        launch(ranks, "stream_worker.py", tmp_path, ranks)
    alone = json.loads((tmp_path / "rows-1-0.json").read_text())
    both = [json.loads((tmp_path / f"rows-2-{rank}.json").read_text()) for rank in range(2)]
    # From step 3 on, and the rows of a step are dealt out in their order.
    assert [one + two for one, two in zip(*both, strict=True)] == alone[3:]

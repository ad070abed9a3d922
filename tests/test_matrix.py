"""README's table of loaders and trainers, each with its real package: what they show the model, and after a stop."""

import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matrix_rows
import pytest
import torch
from matrix_rows import CASES, EPOCHS, POPULATION, SELECTED, STOP, Case, batch_size, loss_of, run_case

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata under newer versions of torch


def check(case: Case, ranks: list[dict[str, dict]]) -> None:
    """`ranks`: what each rank saw in each run."""
    for seen in ranks:
        check_runs(case, seen)
    repeated = -len(SELECTED) % case.processes
    rest = len(ranks[0]["whole"]["epochs"][0]) * batch_size * case.processes < len(SELECTED)
    dropped = len(SELECTED) % batch_size if rest else 0
    assert not dropped or case.drop_last
    for epoch in range(EPOCHS):
        seen = Counter(sample for rank in ranks for batch in rank["whole"]["epochs"][epoch] for sample in batch)
        assert set(seen) <= set(SELECTED)
        assert (seen - Counter(SELECTED)).total() == repeated
        assert (Counter(SELECTED) - seen).total() == dropped
    if case.tracks_losses:
        for rank in ranks:
            check_losses(rank, ranks)


def check_runs(case: Case, seen: dict[str, dict]) -> None:
    """On one rank: seeds fix the order, epochs differ, the length is constant, a resumed run sees exactly the rest."""
    whole, (stop_epoch, stop) = seen["whole"]["epochs"], STOP
    steps = len(whole[0])
    assert list(whole) == list(range(EPOCHS))
    assert whole == seen["again"]["epochs"]
    assert len({str(whole[epoch]) for epoch in whole}) == EPOCHS
    assert seen["stopped"]["epochs"] == {0: whole[0], stop_epoch: whole[stop_epoch][:stop]}
    assert seen["resumed"]["epochs"] == {stop_epoch: whole[stop_epoch][stop:], 2: whole[2]}
    lengths = set().union(*(run["lengths"] for run in seen.values()))
    assert lengths == {steps if case.has_length else None}


def check_losses(seen: dict[str, dict], ranks: list[dict[str, dict]]) -> None:
    """One rank knows the losses of what all ranks saw, each at its own sample, also after a resume."""
    batches = [batch for rank in ranks for epoch in rank["whole"]["epochs"].values() for batch in epoch]
    shown = torch.tensor([sample for batch in batches for sample in batch]).unique()
    expected = torch.full((POPULATION,), torch.nan)
    expected[shown] = loss_of(shown)
    for kind in ("whole", "resumed"):
        torch.testing.assert_close(seen[kind]["losses"], expected, rtol=0, atol=0, equal_nan=True)


def cases(*, processes: int, refused: bool = False) -> pytest.MarkDecorator:
    chosen = [case for case in CASES if case.processes == processes and bool(case.refused) == refused]
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=marks(case)) for case in chosen])


def marks(case: Case) -> list[pytest.MarkDecorator]:
    missing = pytest.mark.skipif(not case.available, reason=f"there is no {case.needs}")
    return [missing, pytest.mark.slow] if case.needs in ("lightning", "transformers", "accelerate") else [missing]


@cases(processes=1)
def test_on_one_process(case, tmp_path):
    check(case, [run_case(case, tmp_path)])


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """Runs all cases of a number of processes at once, when the first of them is asked for."""
    folders = {}

    def results(case: Case) -> list[dict[str, dict]]:
        if case.processes not in folders:
            folders[case.processes] = folder = tmp_path_factory.mktemp("ranks")
            command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", *command, matrix_rows.__file__, "torchrun", str(folder)]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            (folder / "output").write_text(run.stdout + run.stderr)
        files = [folders[case.processes] / f"{case.name}-{rank}.pt" for rank in range(case.processes)]
        if not all(file.exists() for file in files):
            pytest.fail((folders[case.processes] / "output").read_text()[-5000:])
        return [torch.load(file, weights_only=False) for file in files]

    return results


@pytest.mark.slow
@cases(processes=2)
def test_on_two_processes(case, torchrun):
    check(case, torchrun(case))


@pytest.mark.slow
@cases(processes=4)
def test_on_four_processes(case, torchrun):
    check(case, torchrun(case))


@cases(processes=1, refused=True)
def test_what_cannot_work_is_refused_with_its_reason(case, tmp_path):
    with pytest.raises(ValueError, match=case.refused):
        run_case(case, tmp_path)


@pytest.mark.slow
def test_processes_that_lightning_starts_itself_share_the_epochs(tmp_path):
    pytest.importorskip("lightning")
    command = [sys.executable, matrix_rows.__file__, "lightning", str(tmp_path)]
    run = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-5000:]
    ranks = [torch.load(tmp_path / f"launched-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for epoch in range(EPOCHS):
        samples = [sample for rank in ranks for batch in rank[epoch] for sample in batch]
        assert sorted(set(samples)) == SELECTED
        assert len(samples) == len(SELECTED) + 1


# --- the table itself


def readme_table() -> dict[str, list[str]]:
    """The cells of README's table, by its first column."""
    lines = (Path(__file__).parents[1] / "README.md").read_text().splitlines()
    begin = lines.index("| loader or trainer | lines of code | processes | resume in mid-epoch | remark |") + 2
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {row[0]: row[1:] for row in rows}


def test_readmes_table_has_the_rows_and_numbers_of_processes_that_are_run():
    tested = {case.row: sorted({other.processes for other in CASES if other.row == case.row}) for case in CASES}
    table = readme_table()
    assert list(table) == list(tested)
    for row, (code, processes, _, remark) in table.items():
        assert processes == ", ".join(map(str, tested[row]))
        refusals = [case.refused for case in CASES if case.row == row and case.refused]
        assert (code == "refused") == bool(refusals)
        assert all(words in remark for words in refusals)


def test_readmes_lines_of_code_are_those_that_are_run():
    for row, (code, _, resume, _) in readme_table().items():
        functions = {case.train for case in CASES if case.row == row} | {matrix_rows.loop, matrix_rows.timm}
        source = "".join(inspect.getsource(function) for function in functions)
        for line in re.findall("`(.+?)`", "" if code == "refused" else code + resume.removeprefix("as `DataLoader`")):
            assert line.rstrip(")") in source, f"{line} is no line of {row}"
